//! A device's memory, and the one queue of work that a backend gives it.
//!
//! Everything that touches the device goes through here: what is queued runs in order, and memory that it uses is freed
//! only when it has run.

use std::collections::HashSet;
use std::ffi::c_void;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use cudarc::driver::{result, sys};

use crate::error::{Error, Result};

/// A device's context and a queue on it.
#[derive(Debug)]
pub(crate) struct Stream {
    index: usize,
    device: sys::CUdevice,
    context: sys::CUcontext,
    stream: sys::CUstream,
    /// Devices that it can copy from.
    reached: Mutex<HashSet<usize>>,
    /// Pieces of memory that were handed out or freed.
    changes: AtomicU64,
    /// Whether memory begins as no number.
    poisons: AtomicBool,
}

// SAFETY: the driver's calls may be made from any thread; each of ours makes the context its thread's first.
unsafe impl Send for Stream {}
// SAFETY: as above; calls that queue work are themselves safe beside each other.
unsafe impl Sync for Stream {}

/// How a kernel is spread over the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Grid {
    /// Thread blocks in each direction.
    pub(crate) blocks: [usize; 3],
    /// Threads of a block.
    pub(crate) threads: usize,
    /// Memory of a block beside what the kernel declares.
    pub(crate) block_bytes: usize,
}

/// An argument of a kernel, as many bytes as its parameter.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Argument {
    Pointer(u64),
    U32(u32),
    U64(u64),
    F32(f32),
}

/// Most parameters of any kernel here.
const MOST_ARGUMENTS: usize = 16;

impl Stream {
    /// Opens a device; the driver is running.
    pub(crate) fn open(index: usize) -> Result<Arc<Stream>> {
        Stream::open_with(index, 0)
    }

    /// As [`Stream::open`]; of what waits for room on the device, this queue's work comes before that of others.
    pub(crate) fn open_urgent(index: usize) -> Result<Arc<Stream>> {
        Stream::open_with(index, -1)
    }

    /// Lower priorities come first, and those that the device does not have are taken for the nearest that it has.
    fn open_with(index: usize, priority: i32) -> Result<Arc<Stream>> {
        let what = |error| failed(index, "open", error);
        let device = result::device::get(index as i32).map_err(what)?;
        // Who waits for the device sleeps meanwhile. By itself the driver keeps asking, which takes a core for each stage.
        let sleeps = sys::CUctx_flags::CU_CTX_SCHED_BLOCKING_SYNC as u32;
        // SAFETY: the device is the driver's.
        unsafe { sys::cuDevicePrimaryCtxSetFlags_v2(device, sleeps) }.result().map_err(what)?;
        // SAFETY: the device is the driver's, and what is retained is released in `drop`.
        let context = unsafe { result::primary_ctx::retain(device) }.map_err(what)?;
        let mut stream = Stream {
            index,
            device,
            context,
            stream: std::ptr::null_mut(),
            reached: Mutex::default(),
            changes: AtomicU64::new(0),
            poisons: AtomicBool::new(false),
        };
        stream.bind("open")?;
        let kind = result::stream::StreamKind::NonBlocking;
        stream.stream = result::stream::create_with_priority(kind, priority).map_err(what)?;
        Ok(Arc::new(stream))
    }

    /// Makes the device the calling thread's.
    pub(crate) fn bind(&self, op: &'static str) -> Result<()> {
        // SAFETY: the context lives as long as this.
        unsafe { result::ctx::set_current(self.context) }.map_err(|error| failed(self.index, op, error))
    }

    /// Loads compiled kernels.
    pub(crate) fn module(self: &Arc<Self>, cubin: &[u8]) -> Result<Module> {
        self.bind("load kernels")?;
        // SAFETY: the cubin is whole: it has just been compiled, or was found by its hash.
        let module = unsafe { result::module::load_data(cubin.as_ptr().cast()) };
        Ok(Module {
            module: module.map_err(|error| failed(self.index, "load kernels", error))?,
            stream: Arc::clone(self),
        })
    }

    /// Bytes that are free on the device.
    pub(crate) fn free_bytes(&self) -> Result<usize> {
        self.bind("ask for memory")?;
        let (free, _) =
            result::mem_get_info().map_err(|error| failed(self.index, "ask for memory", error))?;
        Ok(free)
    }

    /// Memory of at least a byte, of any content.
    pub(crate) fn allocate(self: &Arc<Self>, what: &'static str, bytes: usize) -> Result<Memory> {
        self.bind(what)?;
        // SAFETY: it is freed in `drop`.
        match unsafe { result::malloc_sync(bytes.max(1)) } {
            Ok(pointer) => {
                self.changes.fetch_add(1, Ordering::Relaxed);
                let memory = Memory { pointer, bytes, stream: Arc::clone(self) };
                if self.poisons.load(Ordering::Relaxed) {
                    self.poison(what, &memory)?;
                }
                Ok(memory)
            }
            Err(result::DriverError(sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY)) => Err(Error::OutOfMemory {
                device: self.index,
                what,
                needed_bytes: bytes as u64,
                free_bytes: self.free_bytes()? as u64,
            }),
            Err(error) => Err(failed(self.index, what, error)),
        }
    }

    /// Memory that is handed out from now on begins as numbers that are none, in every type.
    pub(crate) fn poison_memory(&self) {
        self.poisons.store(true, Ordering::Relaxed);
    }

    fn poison(&self, what: &'static str, memory: &Memory) -> Result<()> {
        // SAFETY: all of the memory is this much; of none a byte was allocated.
        unsafe { result::memset_d8_async(memory.pointer, 0xff, memory.bytes.max(1), self.stream) }
            .map_err(|error| failed(self.index, what, error))?;
        // Other queues may use it at once.
        self.wait(what)
    }

    /// Queues a kernel.
    ///
    /// # Safety
    /// The arguments are those of the kernel, in order, and point to memory of this device that holds all that the kernel
    /// reads and writes with this grid.
    pub(crate) unsafe fn launch(
        &self,
        op: &'static str,
        kernel: &Kernel,
        grid: Grid,
        arguments: &[Argument],
    ) -> Result<()> {
        let blocks = grid.blocks.map(|blocks| blocks as u32);
        if blocks.contains(&0) {
            return Ok(()); // Nothing to do, and the driver refuses such grids.
        }
        self.bind(op)?;
        let mut values = [0u64; MOST_ARGUMENTS];
        let mut pointers = [std::ptr::null_mut::<c_void>(); MOST_ARGUMENTS];
        for ((argument, value), pointer) in arguments.iter().zip(&mut values).zip(&mut pointers) {
            // Bytes beyond a parameter's own are not read; its own are the first, on every machine with CUDA.
            *value = match *argument {
                Argument::Pointer(value) | Argument::U64(value) => value,
                Argument::U32(value) => u64::from(value),
                Argument::F32(value) => u64::from(value.to_bits()),
            };
            *pointer = std::ptr::from_mut(value).cast();
        }
        let shape = (blocks[0], blocks[1], blocks[2]);
        let threads = (grid.threads as u32, 1, 1);
        let arguments = &mut pointers[..arguments.len()];
        // SAFETY: the caller vouches for the arguments; the function is of this context.
        unsafe {
            result::launch_kernel(
                kernel.function,
                shape,
                threads,
                grid.block_bytes as u32,
                self.stream,
                arguments,
            )
        }
        .map_err(|error| failed(self.index, op, error))
    }

    /// Queues a copy to the device. What comes from memory that is not pinned is taken before this returns.
    pub(crate) fn upload(&self, op: &'static str, bytes: &[u8], to: &mut Memory, at: usize) -> Result<()> {
        assert!(at + bytes.len() <= to.bytes, "{op}: {} bytes at {at} of {}", bytes.len(), to.bytes);
        if bytes.is_empty() {
            return Ok(());
        }
        self.bind(op)?;
        // SAFETY: it fits, as asserted; pinned memory is kept until the copy is done by its owner.
        unsafe { result::memcpy_htod_async(to.pointer + at as u64, bytes, self.stream) }
            .map_err(|error| failed(self.index, op, error))
    }

    /// Copies from the device, after all that is queued.
    pub(crate) fn download<T: bytemuck::Pod>(
        &self,
        op: &'static str,
        from: &Memory,
        to: &mut [T],
    ) -> Result<()> {
        assert!(size_of_val(to) <= from.bytes, "{op}: {} bytes of {}", size_of_val(to), from.bytes);
        if to.is_empty() {
            return Ok(());
        }
        self.bind(op)?;
        // SAFETY: there is as much, as asserted, any bits are a `T`, and the copy is waited for.
        unsafe { result::memcpy_dtoh_async(to, from.pointer, self.stream) }
            .map_err(|error| failed(self.index, op, error))?;
        self.wait(op)
    }

    /// Queues a copy to memory of the host, which is pinned where this shall not wait for it.
    ///
    /// # Safety
    /// What `to` points to is there and read by nobody until the copy is done.
    pub(crate) unsafe fn fetch(&self, op: &'static str, from: &Memory, to: &mut [u8]) -> Result<()> {
        assert!(to.len() <= from.bytes, "{op}: {} bytes of {}", to.len(), from.bytes);
        if to.is_empty() {
            return Ok(());
        }
        self.bind(op)?;
        // SAFETY: there is as much, as asserted; the caller vouches for the rest.
        unsafe { result::memcpy_dtoh_async(to, from.pointer, self.stream) }
            .map_err(|error| failed(self.index, op, error))
    }

    /// Queues a copy of so many bytes from memory of this device or of another one, which no other queue writes to meanwhile.
    pub(crate) fn copy(&self, op: &'static str, from: &Memory, to: &Memory, bytes: usize) -> Result<()> {
        assert!(bytes <= from.bytes && bytes <= to.bytes, "{op}: {bytes} of {} to {}", from.bytes, to.bytes);
        if bytes == 0 {
            return Ok(());
        }
        self.reach(op, &from.stream)?;
        self.bind(op)?;
        let (source, target) = (from.pointer, to.pointer);
        // SAFETY: both hold as many bytes, as asserted, and belong to the contexts that are named.
        unsafe {
            match from.stream.index == self.index {
                true => result::memcpy_dtod_async(target, source, bytes, self.stream),
                false => {
                    let (here, there) = (self.context, from.stream.context);
                    result::memcpy_peer_async(here, target, there, source, bytes, self.stream)
                }
            }
        }
        .map_err(|error| failed(self.index, op, error))
    }

    /// Lets this device copy from another one without a detour through the host, where there is a way. Once for each.
    fn reach(&self, op: &'static str, other: &Stream) -> Result<()> {
        let mut reached = self.reached.lock().unwrap_or_else(PoisonError::into_inner);
        if other.index == self.index || !reached.insert(other.index) {
            return Ok(());
        }
        self.bind(op)?;
        let mut can = 0;
        // SAFETY: both devices are the driver's, and it writes a number.
        unsafe { sys::cuDeviceCanAccessPeer(&mut can, self.device, other.device) }
            .result()
            .map_err(|error| failed(self.index, op, error))?;
        if can == 0 {
            return Ok(());
        }
        // SAFETY: both contexts live as long as what holds them.
        match unsafe { sys::cuCtxEnablePeerAccess(other.context, 0) }.result() {
            // Somebody else in this process may have done so.
            Ok(()) | Err(result::DriverError(sys::CUresult::CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED)) => {
                Ok(())
            }
            Err(error) => Err(failed(self.index, op, error)),
        }
    }

    /// Queues zeros.
    pub(crate) fn clear(&self, op: &'static str, memory: &mut Memory) -> Result<()> {
        if memory.bytes == 0 {
            return Ok(());
        }
        self.bind(op)?;
        // SAFETY: all of the memory is this much.
        unsafe { result::memset_d8_async(memory.pointer, 0, memory.bytes, self.stream) }
            .map_err(|error| failed(self.index, op, error))
    }

    /// Queues zeros from the start of memory in which nobody keeps anything.
    pub(crate) fn overwrite(&self, op: &'static str, memory: &Memory, bytes: usize) -> Result<()> {
        assert!((1..=memory.bytes).contains(&bytes), "{op}: {bytes} bytes of {}", memory.bytes);
        self.bind(op)?;
        // SAFETY: there is as much, as asserted.
        unsafe { result::memset_d8_async(memory.pointer, 0, bytes, self.stream) }
            .map_err(|error| failed(self.index, op, error))
    }

    /// A number that is another one when any of its memory has come or gone.
    pub(crate) fn changes(&self) -> u64 {
        self.changes.load(Ordering::Relaxed)
    }

    /// What is queued from now on is kept and not run, until [`Stream::end_capture`]. The calling thread must neither wait nor allocate
    /// meanwhile.
    pub(crate) fn begin_capture(&self, op: &'static str) -> Result<()> {
        self.bind(op)?;
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream lives as long as this.
        unsafe { result::stream::begin_capture(self.stream, mode) }.map_err(|error| self.failed(op, error))
    }

    /// What was kept; an error where something of it cannot be.
    pub(crate) fn end_capture(self: &Arc<Self>, op: &'static str) -> Result<Graph> {
        self.bind(op)?;
        // SAFETY: the stream is captured, by this thread; the graph is not used beyond the executable one that is made of it.
        let executable = unsafe {
            let graph = result::stream::end_capture(self.stream).map_err(|error| self.failed(op, error))?;
            let executable = result::graph::instantiate(graph, sys::CUgraphInstantiate_flags(0));
            let _ = result::graph::destroy(graph);
            executable
        };
        let executable = executable.map_err(|error| self.failed(op, error))?;
        Ok(Graph { executable, stream: Arc::clone(self) })
    }

    /// The queue itself, for a library that queues work of its own.
    pub(crate) fn handle(&self) -> sys::CUstream {
        self.stream
    }

    /// Which device it is, as the driver counts them.
    pub(crate) fn index(&self) -> usize {
        self.index
    }

    /// The driver's word on what was asked of this device.
    pub(crate) fn failed(&self, op: &'static str, error: result::DriverError) -> Error {
        failed(self.index, op, error)
    }

    /// Waits for all that is queued; what went wrong in it is said here at the latest.
    pub(crate) fn wait(&self, op: &'static str) -> Result<()> {
        self.bind(op)?;
        // SAFETY: the stream lives as long as this.
        unsafe { result::stream::synchronize(self.stream) }.map_err(|error| failed(self.index, op, error))
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        // A device that fails has nothing to be freed any more.
        if self.bind("close").is_ok() && !self.stream.is_null() {
            // SAFETY: nobody holds the stream any more: whoever did also held this.
            let _ = unsafe { result::stream::destroy(self.stream) };
        }
        // SAFETY: it was retained once, in `open`.
        let _ = unsafe { result::primary_ctx::release(self.device) };
    }
}

/// Memory of a device.
#[derive(Debug)]
pub(crate) struct Memory {
    pointer: sys::CUdeviceptr,
    bytes: usize,
    stream: Arc<Stream>,
}

impl Memory {
    /// Nothing yet; see [`Memory::reserve`].
    pub(crate) fn none(stream: &Arc<Stream>) -> Memory {
        Memory { pointer: 0, bytes: 0, stream: Arc::clone(stream) }
    }

    /// Where it begins, and so many bytes later.
    pub(crate) fn at(&self, byte: usize) -> Argument {
        Argument::Pointer(self.pointer + byte as u64)
    }

    /// How much of it there is.
    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Whose it is.
    pub(crate) fn stream(&self) -> &Arc<Stream> {
        &self.stream
    }

    /// Where it begins.
    pub(crate) fn start(&self) -> Argument {
        self.at(0)
    }

    /// Makes room for so many bytes; the content may be lost.
    pub(crate) fn reserve(&mut self, what: &'static str, bytes: usize) -> Result<()> {
        if bytes > self.bytes {
            let stream = Arc::clone(&self.stream);
            self.free();
            *self = stream.allocate(what, bytes)?;
        }
        Ok(())
    }

    /// Copies from its start to the host, after all that is queued.
    pub(crate) fn download<T: bytemuck::Pod>(&self, op: &'static str, to: &mut [T]) -> Result<()> {
        self.stream.download(op, self, to)
    }

    fn free(&mut self) {
        let pointer = std::mem::replace(&mut self.pointer, 0);
        self.bytes = 0;
        if pointer == 0 {
            return;
        }
        self.stream.changes.fetch_add(1, Ordering::Relaxed);
        if self.stream.wait("free").is_ok() {
            // SAFETY: it was allocated here, is freed once, and nothing that is queued uses it any more.
            let _ = unsafe { result::free_sync(pointer) };
        }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        self.free();
    }
}

/// Work that was captured, with all its arguments.
#[derive(Debug)]
pub(crate) struct Graph {
    executable: sys::CUgraphExec,
    stream: Arc<Stream>,
}

// SAFETY: as of Stream; it is launched by one thread at a time.
unsafe impl Send for Graph {}

impl Graph {
    /// Queues all of it. What it works with must be there still.
    pub(crate) fn launch(&self, op: &'static str) -> Result<()> {
        self.stream.bind(op)?;
        // SAFETY: the graph lives, and its owner vouches for the memory that it was captured with.
        unsafe { result::graph::launch(self.executable, self.stream.stream) }
            .map_err(|error| self.stream.failed(op, error))
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        if self.stream.wait("drop a graph").is_ok() {
            // SAFETY: it was instantiated once, and no launch of it is under way.
            let _ = unsafe { result::graph::exec_destroy(self.executable) };
        }
    }
}

/// Compiled kernels on a device.
#[derive(Debug)]
pub(crate) struct Module {
    module: sys::CUmodule,
    stream: Arc<Stream>,
}

// SAFETY: as of Stream.
unsafe impl Send for Module {}
// SAFETY: as of Stream.
unsafe impl Sync for Module {}

/// One of them.
#[derive(Debug)]
pub(crate) struct Kernel {
    function: sys::CUfunction,
    /// Kept, for the function is in it.
    _module: Arc<Module>,
}

// SAFETY: as of Stream.
unsafe impl Send for Kernel {}
// SAFETY: as of Stream.
unsafe impl Sync for Kernel {}

impl Module {
    /// A kernel, which may be launched with so much memory for each block.
    pub(crate) fn kernel(self: &Arc<Self>, name: &str, block_bytes: usize) -> Result<Kernel> {
        let what = |error| failed(self.stream.index, "find a kernel", error);
        self.stream.bind("find a kernel")?;
        let c_name = std::ffi::CString::new(name).expect("names hold no zero");
        // SAFETY: the module is loaded, and kept by the kernel.
        let function = unsafe { result::module::get_function(self.module, c_name) }.map_err(what)?;
        let attribute = sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        // SAFETY: the function is the module's.
        unsafe { result::function::set_function_attribute(function, attribute, block_bytes as i32) }
            .map_err(what)?;
        Ok(Kernel { function, _module: Arc::clone(self) })
    }
}

impl Drop for Module {
    fn drop(&mut self) {
        if self.stream.wait("unload kernels").is_ok() {
            // SAFETY: nothing that is queued uses it any more, and no kernel of it is left.
            let _ = unsafe { result::module::unload(self.module) };
        }
    }
}

fn failed(device: usize, op: &'static str, error: result::DriverError) -> Error {
    Error::Cuda { device, op, message: format!("{:?}", error.0) }
}
