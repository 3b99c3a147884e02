// A libnccl for the emulator's memory: ranks are threads of one process, and numbers are there when a group of moves ends.
//
// What is sent waits in a box of its sender and receiver, so that nobody waits but for what it receives. Who waits for a rank
// that has left is told so, and would wait for ever in the library: a test that does this ends.
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <vector>

#define API extern "C" __attribute__((visibility("default")))
using Status = int;
constexpr Status SUCCESS = 0, INVALID_ARGUMENT = 4, INVALID_USAGE = 5, REMOTE_ERROR = 6;
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

struct Receipt {
    Communicator* communicator;
    float* to;
    size_t count;
    int peer;
};

struct UniqueId {
    char bytes[128];
};

// Never destroyed: threads of a program that ends may still be at work.
std::mutex& lock = *new std::mutex();
std::condition_variable& changed = *new std::condition_variable();
std::map<uint64_t, std::shared_ptr<Group>>& groups = *new std::map<uint64_t, std::shared_ptr<Group>>();
uint64_t num_groups = 0;

thread_local int depth = 0;
thread_local std::vector<Receipt> receipts;

bool is_known(const Communicator* communicator, int type, int peer) {
    return communicator && type == FLOAT32 && peer >= 0 && peer < communicator->group->num_ranks;
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
    std::lock_guard<std::mutex> guard(lock);
    communicator->group->gone.insert(communicator->rank);
    changed.notify_all();
    return delete communicator, SUCCESS;
}

API Status ncclGroupStart() { return depth++, SUCCESS; }

API Status ncclSend(const float* from, size_t count, int type, int peer, Communicator* communicator, void*) {
    if (!is_known(communicator, type, peer)) return INVALID_ARGUMENT;
    std::lock_guard<std::mutex> guard(lock);
    communicator->group->boxes[{communicator->rank, peer}].emplace_back(from, from + count);
    changed.notify_all();
    return SUCCESS;
}

API Status ncclRecv(float* to, size_t count, int type, int peer, Communicator* communicator, void*) {
    if (!is_known(communicator, type, peer)) return INVALID_ARGUMENT;
    if (depth == 0) return INVALID_USAGE; // Here receipts are of groups alone.
    return receipts.push_back({communicator, to, count, peer}), SUCCESS;
}

API Status ncclGroupEnd() {
    if (depth == 0) return INVALID_USAGE;
    if (--depth > 0) return SUCCESS;
    std::vector<Receipt> expected;
    expected.swap(receipts);
    for (const Receipt& receipt : expected) {
        std::unique_lock<std::mutex> guard(lock);
        Group& group = *receipt.communicator->group;
        auto& box = group.boxes[{receipt.peer, receipt.communicator->rank}];
        changed.wait(guard, [&] { return group.gone.count(receipt.peer) || !box.empty(); });
        if (box.empty()) return REMOTE_ERROR;
        std::vector<float> numbers = std::move(box.front());
        box.pop_front();
        if (numbers.size() != receipt.count) return INVALID_ARGUMENT;
        if (receipt.count > 0) std::memcpy(receipt.to, numbers.data(), receipt.count * sizeof(float));
    }
    return SUCCESS;
}
