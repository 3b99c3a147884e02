// A libnccl for the emulator's memory, whose ranks are threads of one process or of several: a group is a folder, and what is sent
// is a file in it until it is received. A group of moves is a piece of its stream's work.
//
// Nobody waits but for what it receives; and who waits for a rank that is gone does so for ever, as with the library, until it
// leaves the group itself. Streams go on by themselves, some time, as soon as a process has a group: those of another process may
// wait for them.
//
// What was begun is not under way at once, and nothing else may be begun before.
//
// Ranks may be on one GPU, unless the environment says which version this is to be, 2.30.0 if not set:
//   EMULATED_NCCL=22907             as that, which refuses them, as do those from 23000 on without NCCL_MULTI_RANK_GPU_ENABLE=1
// To leave takes a while, or the environment says that ranks of processes that live wait there for each other:
//   EMULATED_NCCL_ABORT=waits
#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <unistd.h>
#include <vector>

#include "queues.h"

#define API extern "C" __attribute__((visibility("default")))
namespace fs = std::filesystem;
using Status = int;
using emulated::Outcome;
constexpr Status SUCCESS = 0, UNHANDLED_CUDA_ERROR = 1, INVALID_ARGUMENT = 4, INVALID_USAGE = 5, IN_PROGRESS = 7;
constexpr int FLOAT32 = 7;
// So often it is said of what was begun that it is not under way yet.
constexpr int LOOKS = 2;
constexpr std::chrono::milliseconds LEAVING(20);

namespace {

const std::string PREFIX = "emulated-nccl-";

// Folders may go at any time, with a rank that leaves or a process that sweeps: nothing here throws for that.
bool is_there(const fs::path& path) {
    std::error_code gone;
    return fs::exists(path, gone);
}

struct UniqueId {
    char bytes[128];
};

// As of version 2.14.
struct Config {
    size_t size;
    unsigned magic, version;
    int blocking;
};

// A rank's place in a group.
struct Place {
    fs::path folder;
    int rank, num_ranks;
    // Numbers of moves so far, by the other rank.
    std::map<int, size_t> sent, received;
    std::atomic<bool> is_complete{false}, has_left{false};
    // Until what was begun is under way.
    std::atomic<int> looks{0};

    fs::path file(const std::string& what, int number) const { return folder / (what + "-" + std::to_string(number)); }
    fs::path message(int from, int to, size_t number) const {
        return folder / (std::to_string(from) + "-" + std::to_string(to) + "-" + std::to_string(number));
    }
    bool all(const std::string& what) const {
        for (int other = 0; other < num_ranks; other++) {
            if (!is_there(file(what, other))) return false;
        }
        return true;
    }
    // Whether another rank is in the group still, and its process lives.
    bool has_company() const {
        for (int other = 0; other < num_ranks; other++) {
            int device = -1, process = 0;
            std::ifstream(file("rank", other)) >> device >> process;
            bool is_in = process > 0 && !is_there(file("gone", other)) && kill(process, 0) == 0;
            if (other != rank && is_in) return true;
        }
        return false;
    }
    // Whether two ranks of a group that is complete are on one GPU.
    bool has_two_on_one() const {
        std::set<int> devices;
        for (int other = 0; other < num_ranks; other++) {
            int device = -1;
            std::ifstream(file("rank", other)) >> device;
            if (!devices.insert(device).second) return true;
        }
        return false;
    }
    // Also for a process that ends without a word, and then while others of its threads are at work.
    void leave() {
        if (has_left.exchange(true)) return;
        std::ofstream(file("gone", rank)).flush();
        // The last one takes all of it along; so may several at once.
        std::error_code ignored;
        if (all("gone")) fs::remove_all(folder, ignored);
    }
};

struct Communicator {
    std::shared_ptr<Place> place;
};

// Numbers that go to a peer, or come from it.
struct Move {
    float* at;
    size_t count;
    int peer;
    bool is_receipt;
};

// Moves of one rank that go on beside each other.
struct Moves {
    void* stream;
    std::shared_ptr<Place> place;
    std::vector<Move> moves;

    Outcome run(bool& has_sent) const;
};

thread_local int depth = 0;
thread_local std::vector<Moves> open;

// Whether ranks may be on one GPU.
bool may_share_gpus() {
    const char *version = std::getenv("EMULATED_NCCL"), *asked = std::getenv("NCCL_MULTI_RANK_GPU_ENABLE");
    return !version || (std::atoi(version) >= 23000 && asked && std::string(asked) == "1");
}

Status may_move(const Communicator* communicator, int type, int peer) {
    if (!communicator || type != FLOAT32 || peer < 0 || peer >= communicator->place->num_ranks) return INVALID_ARGUMENT;
    // Here moves are of groups alone.
    return depth == 0 || communicator->place->looks > 0 ? INVALID_USAGE : SUCCESS;
}

// Runs alone: libcuda's lock is held. Who holds it calls nothing of libcuda.
Outcome Moves::run(bool& has_sent) const {
    // What a rank has queued ends with its own leaving.
    if (place->has_left) return Outcome::Done;
    int rank = place->rank;
    for (const Move& move : moves) {
        if (has_sent || move.is_receipt) continue;
        fs::path at = place->message(rank, move.peer, place->sent[move.peer]++), unfinished = at;
        unfinished += ".part";
        std::ofstream(unfinished, std::ios::binary).write(reinterpret_cast<const char*>(move.at), move.count * sizeof(float));
        std::error_code ignored; // The other ranks may have left, and taken the folder along.
        fs::rename(unfinished, at, ignored);
    }
    has_sent = true;
    std::map<int, size_t> wanted;
    for (const Move& move : moves) wanted[move.peer] += move.is_receipt;
    for (auto [peer, count] : wanted) {
        // They come in order.
        if (count > 0 && !is_there(place->message(peer, rank, place->received[peer] + count - 1))) return Outcome::Waits;
    }
    for (const Move& move : moves) {
        if (!move.is_receipt) continue;
        fs::path at = place->message(move.peer, rank, place->received[move.peer]++);
        std::error_code gone; // By another thread that left, or a process that swept.
        if (fs::file_size(at, gone) != move.count * sizeof(float)) return gone ? Outcome::Waits : Outcome::Failed;
        std::ifstream(at, std::ios::binary).read(reinterpret_cast<char*>(move.at), move.count * sizeof(float));
        fs::remove(at, gone);
    }
    return Outcome::Done;
}

Status add(Communicator* communicator, void* stream, Move move) {
    for (Moves& moves : open) {
        if (moves.stream == stream && moves.place == communicator->place) return moves.moves.push_back(move), SUCCESS;
    }
    open.push_back({stream, communicator->place, {move}});
    return SUCCESS;
}

fs::path folder_of_groups() { return fs::is_directory("/dev/shm") ? "/dev/shm" : fs::temp_directory_path(); }

// Folders that processes have left behind that were killed.
void sweep() {
    std::error_code ignored;
    for (fs::directory_iterator at(folder_of_groups(), ignored), end; at != end && !ignored; at.increment(ignored)) {
        std::string name = at->path().filename();
        int process = 0;
        if (name.rfind(PREFIX, 0) == 0) std::sscanf(name.c_str() + PREFIX.size(), "%d-", &process);
        std::error_code gone;
        if (process > 0 && kill(process, 0) != 0 && errno == ESRCH) fs::remove_all(at->path(), gone);
    }
}

// All that a process has had. Never destroyed.
std::mutex& places_lock = *new std::mutex();
std::vector<std::weak_ptr<Place>>& places = *new std::vector<std::weak_ptr<Place>>();

void leave_all() {
    std::lock_guard<std::mutex> guard(places_lock);
    for (auto& place : places) {
        if (auto still = place.lock()) still->leave();
    }
    sweep();
}

// From now on streams go on by themselves.
void begin(const std::shared_ptr<Place>& place) {
    std::lock_guard<std::mutex> guard(places_lock);
    places.push_back(place);
    static std::once_flag begun;
    std::call_once(begun, [] {
        std::atexit(leave_all);
        std::thread([] {
            for (;;) {
                emulated_go_on();
                std::this_thread::sleep_for(std::chrono::microseconds(200));
            }
        }).detach();
    });
}

}  // namespace

API Status ncclGetVersion(int* version) {
    const char* text = std::getenv("EMULATED_NCCL");
    return *version = text ? std::atoi(text) : 23000, SUCCESS;
}

API Status ncclGetUniqueId(UniqueId* id) {
    static std::atomic<unsigned> count{0};
    sweep();
    std::string name = PREFIX + std::to_string(getpid()) + "-" + std::to_string(count++);
    std::memset(id, 0, sizeof(*id));
    std::strncpy(id->bytes, (folder_of_groups() / name).c_str(), sizeof(id->bytes) - 1);
    return SUCCESS;
}

// Comes back at once: whether all are there is said by ncclCommGetAsyncError.
API Status ncclCommInitRankConfig(Communicator** communicator, int num_ranks, UniqueId id, int rank, const Config* config) {
    if (config->magic != 0xcafebeef || config->version < 21400 || config->size < sizeof(Config) || config->blocking != 0) {
        return INVALID_ARGUMENT;
    }
    fs::path folder(std::string(id.bytes, strnlen(id.bytes, sizeof(id.bytes))));
    if (folder.filename().string().rfind(PREFIX, 0) != 0 || rank < 0 || rank >= num_ranks) return INVALID_ARGUMENT;
    auto place = std::make_shared<Place>();
    place->folder = folder, place->rank = rank, place->num_ranks = num_ranks;
    std::error_code exists;
    fs::create_directory(folder, exists);
    if (is_there(place->file("rank", rank))) return INVALID_USAGE;
    // As a whole: others read what is there.
    fs::path unfinished = place->file("coming", rank);
    std::ofstream(unfinished) << emulated_device() << ' ' << getpid();
    fs::rename(unfinished, place->file("rank", rank), exists);
    *communicator = new Communicator{place};
    begin(place);
    return IN_PROGRESS;
}

API Status ncclCommGetAsyncError(Communicator* communicator, Status* state) {
    Place& place = *communicator->place;
    if (!place.is_complete) {
        if (!place.all("rank")) return *state = IN_PROGRESS, SUCCESS;
        if (!may_share_gpus() && place.has_two_on_one()) return *state = INVALID_USAGE, SUCCESS;
        place.is_complete = true;
    }
    if (place.looks > 0) return place.looks--, *state = IN_PROGRESS, SUCCESS;
    return *state = SUCCESS, SUCCESS;
}

API Status ncclCommAbort(Communicator* communicator) {
    Place& place = *communicator->place;
    place.leave();
    emulated_wake();
    const char* how = std::getenv("EMULATED_NCCL_ABORT");
    bool waits = how && std::string(how) == "waits";
    do std::this_thread::sleep_for(LEAVING);
    while (waits && place.has_company());
    return delete communicator, SUCCESS;
}

API Status ncclGroupStart() { return depth++, SUCCESS; }

API Status ncclGroupEnd() {
    if (depth == 0) return INVALID_USAGE;
    if (--depth > 0) return SUCCESS;
    std::vector<Moves> ended;
    ended.swap(open);
    Status status = SUCCESS;
    for (const Moves& moves : ended) {
        int queued = emulated_queue(moves.stream, [moves, has_sent = false]() mutable { return moves.run(has_sent); });
        if (queued != 0) return UNHANDLED_CUDA_ERROR;
        moves.place->looks = LOOKS;
        status = IN_PROGRESS;
    }
    return status;
}

API Status ncclSend(float* from, size_t count, int type, int peer, Communicator* communicator, void* stream) {
    Status may = may_move(communicator, type, peer);
    return may == SUCCESS ? add(communicator, stream, {from, count, peer, false}) : may;
}

API Status ncclRecv(float* to, size_t count, int type, int peer, Communicator* communicator, void* stream) {
    Status may = may_move(communicator, type, peer);
    return may == SUCCESS ? add(communicator, stream, {to, count, peer, true}) : may;
}
