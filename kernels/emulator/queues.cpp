// Streams, events and graphs, which mean what CUDA's mean and promise no more.
//
// What is queued runs when somebody waits for it, or at any time before. Streams know of each other by events alone: which of them
// goes on is drawn, so that what lacks a wait meets numbers that are not there yet, or not any more. EMULATED_SEED draws another
// order.
#include <algorithm>
#include <chrono>
#include <deque>
#include <memory>
#include <thread>
#include <vector>

#include "driver.h"

using emulated::Outcome;
using emulated::Work;

namespace {

// CUstreamCaptureMode.
constexpr int GLOBAL = 0, THREAD_LOCAL = 1;
// CUevent_flags.
constexpr unsigned DISABLE_TIMING = 2;

struct Graph {
    std::vector<Work> nodes;
};

struct Capture {
    std::unique_ptr<Graph> graph;
    std::thread::id owner;
    int mode;
    bool is_void;
};

struct Stream {
    Device* device;
    std::deque<Work> queue;
    std::unique_ptr<Capture> capture;
    bool has_failed;
};

// A place in a stream.
struct Record {
    Stream* stream;
    bool is_passed;
    std::chrono::steady_clock::time_point at;
};

struct Event {
    Device* device;
    bool is_timed;
    // Where it was recorded last, if it was.
    std::shared_ptr<Record> record;
};

// Never destroyed: threads of a program that ends may still be at work.
std::condition_variable_any& changed = *new std::condition_variable_any();
std::vector<Stream*>& streams = *new std::vector<Stream*>();
unsigned num_waiting = 0;

// One of so many.
unsigned draw(unsigned choices) {
    static unsigned long long state = number("EMULATED_SEED", 1) * 0x9e3779b97f4a7c15ull | 1;
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return unsigned((state >> 33) % choices);
}

void wake() {
    if (num_waiting > 0) changed.notify_all();
}

// Does what a stream has first; whether it could.
bool advance(Stream& stream) {
    if (stream.queue.empty() || stream.has_failed) return false;
    Outcome outcome = stream.queue.front()();
    if (outcome == Outcome::Waits) return false;
    if (outcome == Outcome::Failed) stream.has_failed = true, stream.queue.clear();
    else stream.queue.pop_front();
    return wake(), true;
}

// The same of any stream but one.
bool advance_another(const Stream* but) {
    size_t first = streams.empty() ? 0 : draw(unsigned(streams.size()));
    for (size_t i = 0; i < streams.size(); i++) {
        Stream* stream = streams[(first + i) % streams.size()];
        if (stream != but && advance(*stream)) return true;
    }
    return false;
}

void wait_for_change(Guard& guard) {
    num_waiting++;
    changed.wait(guard);
    num_waiting--;
}

// Lets things happen until one has.
template <typename IsDone>
Result wait_for(Guard& guard, Stream& stream, IsDone is_done) {
    // Nothing but what must be, all else first, or turn by turn.
    unsigned mood = draw(3);
    while (!is_done()) {
        if (stream.has_failed) return LAUNCH_FAILED;
        bool others_first = mood == 1 || (mood == 2 && draw(2) == 0);
        if (others_first && advance_another(&stream)) continue;
        if (advance(stream) || advance_another(&stream)) continue;
        wait_for_change(guard);
    }
    return stream.has_failed ? LAUNCH_FAILED : SUCCESS;
}

}  // namespace

Result queue(void* handle, Work work) {
    auto& stream = *static_cast<Stream*>(handle);
    if (!current || stream.device != current) return INVALID_CONTEXT;
    if (stream.has_failed) return LAUNCH_FAILED;
    if (stream.capture) {
        stream.capture->graph->nodes.push_back(std::move(work));
        return SUCCESS;
    }
    stream.queue.push_back(std::move(work));
    wake();
    // A device does not wait until it is asked.
    if (draw(4) == 0) {
        Stream& any = *streams[draw(unsigned(streams.size()))];
        for (unsigned steps = draw(8); steps > 0 && advance(any); steps--) {}
    }
    return SUCCESS;
}

API int emulated_queue(void* stream, Work work) {
    LOCKED;
    return queue(stream, std::move(work));
}
API void emulated_wake() {
    LOCKED;
    wake();
}

API void emulated_go_on() {
    LOCKED;
    for (unsigned steps = draw(8); steps > 0 && advance_another(nullptr); steps--) {}
}

bool is_captured(void* stream) { return static_cast<Stream*>(stream)->capture != nullptr; }

Result drain(Guard& guard, void* handle) {
    auto& stream = *static_cast<Stream*>(handle);
    return wait_for(guard, stream, [&] { return stream.queue.empty(); });
}

Result drain_all(Guard& guard, Device* device) {
    auto any = [&](auto is) {
        return std::any_of(streams.begin(), streams.end(), [&](Stream* stream) { return stream->device == device && is(*stream); });
    };
    // Others may begin and end streams meanwhile.
    while (any([](Stream& stream) { return !stream.queue.empty(); })) {
        if (!advance_another(nullptr)) wait_for_change(guard);
    }
    return any([](Stream& stream) { return stream.has_failed; }) ? LAUNCH_FAILED : SUCCESS;
}

bool may_wait() {
    bool may = true;
    for (Stream* stream : streams) {
        if (!stream->capture) continue;
        auto& [graph, owner, mode, is_void] = *stream->capture;
        if (mode == GLOBAL || (mode == THREAD_LOCAL && owner == std::this_thread::get_id())) may = false, is_void = true;
    }
    return may;
}

API Result cuStreamCreate(void** stream, unsigned) {
    LOCKED;
    if (!current) return INVALID_CONTEXT;
    streams.push_back(new Stream{current, {}, nullptr, false});
    return *stream = streams.back(), SUCCESS;
}
// What has priority may come first, as anything may.
API Result cuStreamCreateWithPriority(void** stream, unsigned flags, int) { return cuStreamCreate(stream, flags); }
API Result cuStreamDestroy_v2(void* stream) {
    LOCKED;
    drain(guard, stream);
    streams.erase(std::find(streams.begin(), streams.end(), stream));
    return delete static_cast<Stream*>(stream), SUCCESS;
}
API Result cuStreamSynchronize(void* handle) {
    LOCKED;
    auto& stream = *static_cast<Stream*>(handle);
    if (stream.capture) return stream.capture->is_void = true, CAPTURE_UNSUPPORTED;
    NOT_WHILE_CAPTURING;
    return drain(guard, handle);
}

API Result cuStreamBeginCapture_v2(void* handle, int mode) {
    LOCKED;
    auto& stream = *static_cast<Stream*>(handle);
    if (stream.capture) return INVALID_VALUE;
    stream.capture.reset(new Capture{std::make_unique<Graph>(), std::this_thread::get_id(), mode, false});
    return SUCCESS;
}
API Result cuStreamEndCapture(void* handle, void** graph) {
    LOCKED;
    auto& stream = *static_cast<Stream*>(handle);
    *graph = nullptr;
    if (!stream.capture) return INVALID_VALUE;
    if (stream.capture->owner != std::this_thread::get_id()) return CAPTURE_WRONG_THREAD;
    auto capture = std::move(stream.capture);
    if (capture->is_void) return CAPTURE_INVALIDATED;
    return *graph = capture->graph.release(), SUCCESS;
}
API Result cuStreamIsCapturing(void* stream, int* status) {
    LOCKED;
    auto& capture = static_cast<Stream*>(stream)->capture;
    return *status = !capture ? 0 : capture->is_void ? 2 : 1, SUCCESS;
}
API Result cuGraphInstantiateWithFlags(void** executable, void* graph, unsigned long long) {
    LOCKED;
    return *executable = new Graph(*static_cast<Graph*>(graph)), SUCCESS;
}
API Result cuGraphDestroy(void* graph) { return delete static_cast<Graph*>(graph), SUCCESS; }
API Result cuGraphExecDestroy(void* executable) {
    LOCKED;
    return delete static_cast<Graph*>(executable), SUCCESS;
}
API Result cuGraphLaunch(void* executable, void* stream) {
    LOCKED;
    for (const Work& node : static_cast<Graph*>(executable)->nodes) {
        if (Result queued = queue(stream, node)) return queued;
    }
    return SUCCESS;
}

API Result cuEventCreate(void** event, unsigned flags) {
    if (!current) return INVALID_CONTEXT;
    return *event = new Event{current, !(flags & DISABLE_TIMING), nullptr}, SUCCESS;
}
API Result cuEventDestroy_v2(void* event) {
    LOCKED;
    return delete static_cast<Event*>(event), SUCCESS;
}
API Result cuEventRecord(void* handle, void* stream_handle) {
    LOCKED;
    auto& event = *static_cast<Event*>(handle);
    auto& stream = *static_cast<Stream*>(stream_handle);
    if (event.device != stream.device) return INVALID_HANDLE;
    // Nothing here forks while it captures.
    if (stream.capture) return stream.capture->is_void = true, CAPTURE_UNSUPPORTED;
    auto record = event.record = std::make_shared<Record>(Record{&stream, false, {}});
    return queue_once(&stream, [record] { record->at = std::chrono::steady_clock::now(), record->is_passed = true; });
}
API Result cuStreamWaitEvent(void* handle, void* event, unsigned) {
    LOCKED;
    auto& stream = *static_cast<Stream*>(handle);
    if (stream.capture) return stream.capture->is_void = true, CAPTURE_ISOLATION;
    auto record = static_cast<Event*>(event)->record;
    if (!record || record->is_passed) return SUCCESS;
    return queue(handle, [record] { return record->is_passed ? Outcome::Done : Outcome::Waits; });
}
API Result cuEventQuery(void* event) {
    LOCKED;
    NOT_WHILE_CAPTURING;
    auto record = static_cast<Event*>(event)->record;
    if (!record || record->is_passed) return SUCCESS;
    // Who asks again and again is told in the end.
    advance_another(nullptr);
    return record->is_passed ? SUCCESS : NOT_READY;
}
API Result cuEventSynchronize(void* event) {
    LOCKED;
    NOT_WHILE_CAPTURING;
    auto record = static_cast<Event*>(event)->record;
    if (!record || record->is_passed) return SUCCESS;
    return wait_for(guard, *record->stream, [&] { return record->is_passed; });
}
API Result cuEventElapsedTime_v2(float* milliseconds, void* start, void* end) {
    LOCKED;
    auto &first = *static_cast<Event*>(start), &last = *static_cast<Event*>(end);
    if (!first.is_timed || !last.is_timed || !first.record || !last.record) return INVALID_HANDLE;
    if (!first.record->is_passed || !last.record->is_passed) return NOT_READY;
    *milliseconds = std::chrono::duration<float, std::milli>(last.record->at - first.record->at).count();
    return SUCCESS;
}
