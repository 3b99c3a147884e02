// A libnccl for the emulator's memory: ranks are threads of one process, and a group of moves is a piece of its stream's work.
//
// What is sent waits in a box of its sender and receiver, so that nobody waits but for what it receives. A stream that waits for a
// rank that has left fails, and would wait for ever with the library: a test that does this ends.
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <vector>

#include "queues.h"

#define API extern "C" __attribute__((visibility("default")))
using Status = int;
using emulated::Outcome;
constexpr Status SUCCESS = 0, UNHANDLED_CUDA_ERROR = 1, INVALID_ARGUMENT = 4, INVALID_USAGE = 5;
constexpr int FLOAT32 = 7;

namespace {

struct Group {
    int num_ranks, num_here = 0;
    std::set<int> gone;
    // By sender and receiver.
    std::map<std::pair<int, int>, std::deque<std::vector<float>>> boxes;
};

struct Communicator {
    std::shared_ptr<Group> group;
    int rank;
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
    std::shared_ptr<Group> group;
    int rank;
    std::vector<Move> moves;

    Outcome run(bool& has_sent) const;
};

struct UniqueId {
    char bytes[128];
};

// Never destroyed: threads of a program that ends may still be at work. Who holds it calls nothing of libcuda.
std::mutex& lock = *new std::mutex();
std::condition_variable& changed = *new std::condition_variable();
std::map<uint64_t, std::shared_ptr<Group>>& groups = *new std::map<uint64_t, std::shared_ptr<Group>>();
uint64_t num_groups = 0;

thread_local int depth = 0;
thread_local std::vector<Moves> open;

bool is_known(const Communicator* communicator, int type, int peer) {
    return communicator && type == FLOAT32 && peer >= 0 && peer < communicator->group->num_ranks;
}

Outcome Moves::run(bool& has_sent) const {
    std::lock_guard<std::mutex> guard(lock);
    // What a rank has queued ends with its own leaving.
    if (group->gone.count(rank)) return Outcome::Done;
    for (const Move& move : moves) {
        if (!has_sent && !move.is_receipt) group->boxes[{rank, move.peer}].emplace_back(move.at, move.at + move.count);
    }
    has_sent = true;
    std::map<int, size_t> wanted;
    for (const Move& move : moves) wanted[move.peer] += move.is_receipt;
    for (auto [peer, count] : wanted) {
        if (group->boxes[{peer, rank}].size() < count) return group->gone.count(peer) ? Outcome::Failed : Outcome::Waits;
    }
    for (const Move& move : moves) {
        if (!move.is_receipt) continue;
        auto& box = group->boxes[{move.peer, rank}];
        if (box.front().size() != move.count) return Outcome::Failed;
        if (move.count > 0) std::memcpy(move.at, box.front().data(), move.count * sizeof(float));
        box.pop_front();
    }
    return Outcome::Done;
}

Status add(Communicator* communicator, void* stream, Move move) {
    for (Moves& moves : open) {
        if (moves.stream == stream && moves.group == communicator->group) return moves.moves.push_back(move), SUCCESS;
    }
    open.push_back({stream, communicator->group, communicator->rank, {move}});
    return SUCCESS;
}

}  // namespace

API Status ncclGetUniqueId(UniqueId* id) {
    std::lock_guard<std::mutex> guard(lock);
    uint64_t number = ++num_groups;
    std::memset(id, 0, sizeof(*id));
    return std::memcpy(id, &number, sizeof(number)), SUCCESS;
}

API Status ncclCommInitRank(Communicator** communicator, int num_ranks, UniqueId id, int rank) {
    uint64_t number;
    std::memcpy(&number, &id, sizeof(number));
    std::unique_lock<std::mutex> guard(lock);
    if (number == 0 || number > num_groups || rank < 0 || rank >= num_ranks) return INVALID_ARGUMENT;
    auto& group = groups[number];
    if (!group) group = std::make_shared<Group>(Group{num_ranks});
    if (group->num_ranks != num_ranks) return INVALID_ARGUMENT;
    *communicator = new Communicator{group, rank};
    if (++group->num_here == num_ranks) changed.notify_all();
    auto joined = group;
    changed.wait(guard, [&] { return joined->num_here == num_ranks; });
    groups.erase(number);
    return SUCCESS;
}

API Status ncclCommAbort(Communicator* communicator) {
    {
        std::lock_guard<std::mutex> guard(lock);
        communicator->group->gone.insert(communicator->rank);
    }
    emulated_wake();
    return delete communicator, SUCCESS;
}

API Status ncclGroupStart() { return depth++, SUCCESS; }

API Status ncclGroupEnd() {
    if (depth == 0) return INVALID_USAGE;
    if (--depth > 0) return SUCCESS;
    std::vector<Moves> ended;
    ended.swap(open);
    for (const Moves& moves : ended) {
        int queued = emulated_queue(moves.stream, [moves, has_sent = false]() mutable { return moves.run(has_sent); });
        if (queued != 0) return UNHANDLED_CUDA_ERROR;
    }
    return SUCCESS;
}

API Status ncclSend(float* from, size_t count, int type, int peer, Communicator* communicator, void* stream) {
    if (!is_known(communicator, type, peer)) return INVALID_ARGUMENT;
    if (depth == 0) return INVALID_USAGE; // Here moves are of groups alone.
    return add(communicator, stream, {from, count, peer, false});
}

API Status ncclRecv(float* to, size_t count, int type, int peer, Communicator* communicator, void* stream) {
    if (!is_known(communicator, type, peer)) return INVALID_ARGUMENT;
    if (depth == 0) return INVALID_USAGE;
    return add(communicator, stream, {to, count, peer, true});
}
