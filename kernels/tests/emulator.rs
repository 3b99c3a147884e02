//! The emulator's driver promises no more than CUDA's does: what lacks a wait meets it that there was none.
//!
//! Which of several streams goes on is drawn, so that each is tried often.

use std::ffi::c_void;
use std::path::Path;

use cudarc::driver::{result, sys};
use kernels::Gpu;

/// Tries of what must never happen, or must happen at least once.
const TRIES: u32 = 64;

const BYTES: usize = 256;

/// The emulator's only device, opened for the calling thread.
fn open() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/cuda-emulator");
    assert!(
        folder.join("libcuda.so").is_file(),
        "{} is missing\nhint: cargo xtask emulator",
        folder.display()
    );
    Gpu::all(Some(&folder)).unwrap();
    // SAFETY: the driver has been started, and the device is its first.
    unsafe {
        result::ctx::set_current(result::primary_ctx::retain(result::device::get(0).unwrap()).unwrap())
    }
    .unwrap();
}

/// What a test works with, all of it owned by a process that ends.
#[derive(Clone, Copy)]
struct Stream(sys::CUstream);

impl Stream {
    fn new() -> Stream {
        Stream(result::stream::create(result::stream::StreamKind::NonBlocking).unwrap())
    }

    fn wait(self) {
        // SAFETY: streams are never destroyed here.
        unsafe { result::stream::synchronize(self.0) }.unwrap();
    }

    fn fill(self, to: u64, value: u8) {
        // SAFETY: all memory here is this large.
        unsafe { result::memset_d8_async(to, value, BYTES, self.0) }.unwrap();
    }

    fn copy(self, to: u64, from: u64) {
        // SAFETY: as above.
        unsafe { result::memcpy_dtod_async(to, from, BYTES, self.0) }.unwrap();
    }

    fn upload(self, to: u64, from: &[u8]) {
        // SAFETY: as above; tests keep or change what is copied as they mean to.
        unsafe { result::memcpy_htod_async(to, from, self.0) }.unwrap();
    }

    fn read(self, from: u64) -> u8 {
        let mut bytes = [0; BYTES];
        // SAFETY: as above, and it is waited for.
        unsafe { result::memcpy_dtoh_async(&mut bytes, from, self.0) }.unwrap();
        self.wait();
        assert_eq!(bytes, [bytes[0]; BYTES]);
        bytes[0]
    }

    fn record(self, event: sys::CUevent) {
        // SAFETY: events are never destroyed here.
        unsafe { result::event::record(event, self.0) }.unwrap();
    }

    fn wait_for(self, event: sys::CUevent) {
        // SAFETY: as above.
        unsafe { result::stream::wait_event(self.0, event, sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT) }
            .unwrap();
    }

    fn capture(self, mode: sys::CUstreamCaptureMode) {
        // SAFETY: the stream lives.
        unsafe { result::stream::begin_capture(self.0, mode) }.unwrap();
    }

    fn end_capture(self) -> Result<sys::CUgraphExec, sys::CUresult> {
        // SAFETY: the stream lives, and the graph is the one that it has captured.
        unsafe {
            let graph = result::stream::end_capture(self.0).map_err(|error| error.0)?;
            let executable = result::graph::instantiate(graph, sys::CUgraphInstantiate_flags(0)).unwrap();
            result::graph::destroy(graph).unwrap();
            Ok(executable)
        }
    }

    fn launch(self, graph: sys::CUgraphExec) {
        // SAFETY: graphs are never destroyed here.
        unsafe { result::graph::launch(graph, self.0) }.unwrap();
    }
}

fn allocate() -> Result<u64, sys::CUresult> {
    // SAFETY: it is never freed.
    unsafe { result::malloc_sync(BYTES) }.map_err(|error| error.0)
}

fn memory() -> u64 {
    allocate().unwrap()
}

fn event(flags: sys::CUevent_flags) -> sys::CUevent {
    result::event::create(flags).unwrap()
}

fn pinned() -> &'static mut [u8] {
    // SAFETY: it is never freed, and nobody else knows of it; the copies from it are what is tested.
    unsafe {
        let start: *mut c_void = result::malloc_host(BYTES, 0).unwrap();
        std::slice::from_raw_parts_mut(start.cast(), BYTES)
    }
}

/// Tries of which something is true.
fn count(mut is_true: impl FnMut() -> bool) -> u32 {
    (0..TRIES).filter(|_| is_true()).count() as u32
}

#[test]
fn a_stream_waits_for_another_only_by_an_event() {
    open();
    let (first, second, between, end) = (Stream::new(), Stream::new(), memory(), memory());
    let done = event(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING);
    let run = |waits: bool| {
        first.fill(between, 1);
        first.wait();
        first.fill(between, 2);
        first.record(done);
        if waits {
            second.wait_for(done);
        }
        second.copy(end, between);
        second.read(end) == 2
    };
    assert_eq!(count(|| run(true)), TRIES);
    let by_chance = count(|| run(false));
    assert!((1..TRIES).contains(&by_chance), "{by_chance} of {TRIES} met what they did not wait for");
}

#[test]
fn what_is_read_late_is_not_to_be_written_early() {
    open();
    let (first, second, from, to) = (Stream::new(), Stream::new(), memory(), memory());
    let read = event(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING);
    let run = |waits: bool| {
        first.fill(from, 1);
        first.wait();
        second.copy(to, from);
        second.record(read);
        if waits {
            first.wait_for(read);
        }
        first.fill(from, 2);
        first.wait();
        second.read(to) == 1
    };
    assert_eq!(count(|| run(true)), TRIES);
    let by_chance = count(|| run(false));
    assert!((1..TRIES).contains(&by_chance), "{by_chance} of {TRIES} copied in time");
}

#[test]
fn pinned_memory_is_read_when_the_copy_runs_and_other_memory_at_once() {
    open();
    let (stream, to, host) = (Stream::new(), memory(), pinned());
    let is_first = |host: &mut [u8]| {
        host.fill(1);
        stream.upload(to, host);
        host.fill(2);
        stream.read(to) == 1
    };
    let mut pageable = vec![0; BYTES];
    assert_eq!(count(|| is_first(&mut pageable)), TRIES);
    let by_chance = count(|| is_first(host));
    assert!((1..TRIES).contains(&by_chance), "{by_chance} of {TRIES} copies ran before the host went on");
}

#[test]
fn an_event_has_passed_when_what_is_before_it_has_run() {
    open();
    let (stream, to) = (Stream::new(), memory());
    let (start, end) =
        (event(sys::CUevent_flags::CU_EVENT_DEFAULT), event(sys::CUevent_flags::CU_EVENT_DEFAULT));
    // SAFETY: events are never destroyed here.
    let elapsed = || unsafe { result::event::elapsed(start, end) }.map_err(|error| error.0);
    assert_eq!(elapsed(), Err(sys::CUresult::CUDA_ERROR_INVALID_HANDLE), "neither was recorded");
    let is_early = count(|| {
        stream.record(start);
        (0..4).for_each(|_| stream.fill(to, 3));
        stream.record(end);
        let early = elapsed();
        // SAFETY: as above.
        unsafe { result::event::synchronize(end) }.unwrap();
        assert!(elapsed().unwrap() >= 0.0);
        early == Err(sys::CUresult::CUDA_ERROR_NOT_READY)
    });
    assert!(is_early > TRIES / 4, "{is_early} of {TRIES}");
    // Who asks again and again is told in the end.
    stream.record(end);
    // SAFETY: as above.
    while unsafe { result::event::query(end) }.is_err() {}
    let untimed = event(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING);
    stream.record(untimed);
    stream.wait();
    // SAFETY: as above.
    let error = unsafe { result::event::elapsed(start, untimed) }.unwrap_err();
    assert_eq!(error.0, sys::CUresult::CUDA_ERROR_INVALID_HANDLE);
}

#[test]
fn a_graph_does_what_was_captured_with_what_is_there_at_its_launch() {
    open();
    let (stream, from, between, to) = (Stream::new(), memory(), memory(), memory());
    stream.fill(to, 9);
    let mut host = vec![1; BYTES];
    stream.capture(sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL);
    stream.upload(from, &host);
    stream.copy(between, from);
    stream.copy(to, between);
    let graph = stream.end_capture().unwrap();
    assert_eq!(stream.read(to), 9, "what is captured is not done");
    for value in [4, 5] {
        // Memory that is not pinned, too: its address is what was captured.
        host.fill(value);
        stream.launch(graph);
        assert_eq!(stream.read(to), value);
    }
}

#[test]
fn who_captures_does_not_allocate_or_wait() {
    use sys::CUstreamCaptureMode as Mode;
    open();
    let (stream, other, to) = (Stream::new(), Stream::new(), memory());
    let refused = Err(sys::CUresult::CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
    let allocates_elsewhere = || {
        std::thread::spawn(|| {
            open();
            allocate().map(drop)
        })
    };
    for (mode, elsewhere) in
        [(Mode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL, Ok(())), (Mode::CU_STREAM_CAPTURE_MODE_GLOBAL, refused)]
    {
        stream.capture(mode);
        stream.fill(to, 1);
        assert_eq!(allocates_elsewhere().join().unwrap(), elsewhere, "{mode:?}");
        assert_eq!(stream.end_capture().is_ok(), elsewhere.is_ok(), "{mode:?}");
    }
    type Call<'a> = &'a dyn Fn() -> Result<(), sys::CUresult>;
    // SAFETY: the streams live.
    let synchronize =
        |stream: Stream| unsafe { result::stream::synchronize(stream.0) }.map_err(|error| error.0);
    let calls: [Call<'_>; 4] =
        [&|| allocate().map(drop), &|| synchronize(stream), &|| synchronize(other), &|| {
            result::ctx::synchronize().map_err(|error| error.0)
        }];
    for (index, call) in calls.into_iter().enumerate() {
        stream.capture(Mode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL);
        stream.fill(to, 1);
        assert_eq!(call(), refused, "call {index}");
        let ended = stream.end_capture().map(drop);
        assert_eq!(ended, Err(sys::CUresult::CUDA_ERROR_STREAM_CAPTURE_INVALIDATED), "call {index}");
    }
    assert!(allocate().is_ok(), "the thread captures no more");
}
