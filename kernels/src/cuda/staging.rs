//! The way of weights to a device: through two pinned buffers, so that one is filled, by several threads, while the other is copied.

use std::ops::Range;
use std::sync::{Arc, Mutex};

use cudarc::driver::result;
use half::{bf16, f16};

use super::event::Event;
use super::locked;
use super::stream::{Memory, Stream};
use crate::cpu::pool::{ThreadPool, available_cores};
use crate::dtype::bf16_bits;
use crate::error::Result;
use crate::tensor_view::{TensorView, ViewDtype};

/// Bytes of a buffer: at 50 GB/s a copy takes 0.3 ms, long against its start.
const BUFFER_BYTES: usize = 16 << 20;

/// Threads that fill a buffer at most. A core copies from a mapped file at 5 to 10 GB/s and a GPU takes 50 by PCIe 5.0 ×16: eight at
/// 6 GB/s fill a buffer in the 0.3 ms that the other one's copy takes, and more would wait for it.
const MOST_THREADS: usize = 8;
/// Bytes that a thread fills at once, at least: some 40 µs, longer than it takes to wake, and 64 such parts of a buffer even out.
const TASK_BYTES: usize = 256 << 10;

/// Two buffers that take turns.
#[derive(Debug)]
pub(crate) struct Staging {
    pool: ThreadPool,
    buffers: [Pinned; 2],
    next: usize,
}

/// Memory of the host that a device copies from and to by itself.
#[derive(Debug)]
pub(super) struct Pinned {
    start: *mut u8,
    bytes: usize,
    /// Behind the last copy from it or to it.
    copied: Event,
    stream: Arc<Stream>,
}

// SAFETY: the memory is owned.
unsafe impl Send for Pinned {}
// SAFETY: what is shared only reads.
unsafe impl Sync for Pinned {}

impl Staging {
    pub(crate) fn new(stream: &Arc<Stream>) -> Result<Staging> {
        let buffer = || Pinned::new(stream, BUFFER_BYTES);
        // Wherever the system has room for them: devices of other stages load at the same time.
        let pool = ThreadPool::new(&[], available_cores().len().min(MOST_THREADS));
        Ok(Staging { pool, buffers: [buffer()?, buffer()?], next: 0 })
    }

    /// Queues a matrix in bf16 or f32, with rows padded by zeros to `stride` numbers, behind `at` numbers. The view has been
    /// checked.
    pub(crate) fn send<T: Element>(
        &mut self,
        view: &TensorView<'_>,
        stride: usize,
        to: &mut Memory,
        at: usize,
    ) -> Result<()> {
        self.send_rows([view.rows, stride], to, at, |row, columns, out: &mut [T]| {
            read(view, row, columns, out)
        })
    }

    /// Queues `[rows, cols]` numbers, behind `at` numbers. `put` writes some columns of a row, from several threads.
    pub(crate) fn send_rows<T: bytemuck::Pod + Send>(
        &mut self,
        [rows, cols]: [usize; 2],
        to: &mut Memory,
        at: usize,
        put: impl Fn(usize, Range<usize>, &mut [T]) + Sync,
    ) -> Result<()> {
        // A row that is longer than a buffer goes in parts, several shorter ones go together.
        let part = BUFFER_BYTES / size_of::<T>();
        let rows_at_once = (part / cols.max(1)).max(1);
        for first in (0..rows).step_by(rows_at_once) {
            let rows = first..(first + rows_at_once).min(rows);
            for column in (0..cols).step_by(part) {
                let columns = column..(column + part).min(cols);
                let buffer = &mut self.buffers[self.next];
                self.next = 1 - self.next;
                let numbers = buffer.room(rows.len() * columns.len())?;
                fill(&self.pool, first, columns.clone(), numbers, &put);
                buffer.send(
                    to,
                    (at + first * cols + columns.start) * size_of::<T>(),
                    rows.len() * columns.len() * size_of::<T>(),
                )?;
            }
        }
        Ok(())
    }
}

/// Writes some columns of a view's row, and zeros from the view's last column on.
fn read<T: Element>(view: &TensorView<'_>, row: usize, columns: Range<usize>, out: &mut [T]) {
    let there = columns.start.min(view.cols)..columns.end.min(view.cols);
    let (out, rest) = out.split_at_mut(there.len());
    T::read(&view.rows(row..row + 1).columns(there), out);
    rest.fill(T::zeroed());
}

/// Has numbers written that are some columns of rows from `first` on.
fn fill<T: Send>(
    pool: &ThreadPool,
    first: usize,
    columns: Range<usize>,
    numbers: &mut [T],
    put: &(impl Fn(usize, Range<usize>, &mut [T]) + Sync),
) {
    let width = columns.len();
    let rows_each = (TASK_BYTES / (width * size_of::<T>())).max(1);
    let tasks: Vec<Mutex<&mut [T]>> = numbers.chunks_mut(rows_each * width).map(Mutex::new).collect();
    pool.for_each(tasks.len(), |task| {
        let rows = first + task * rows_each..;
        rows.zip(locked(&tasks[task]).chunks_exact_mut(width))
            .for_each(|(row, out)| put(row, columns.clone(), out));
    });
}

/// What numbers of a checkpoint are sent as.
pub(crate) trait Element: bytemuck::Pod + Send {
    /// A row of numbers, rounded to nearest even where these hold less.
    fn read(row: &TensorView<'_>, out: &mut [Self]);
}

/// In bf16.
impl Element for u16 {
    fn read(row: &TensorView<'_>, out: &mut [u16]) {
        if row.dtype == ViewDtype::Bf16 {
            return bytemuck::cast_slice_mut::<u16, u8>(out).copy_from_slice(bytes(row));
        }
        each(row, out, |out, number| *out = bf16_bits(number));
    }
}

impl Element for f32 {
    fn read(row: &TensorView<'_>, out: &mut [f32]) {
        if row.dtype == ViewDtype::F32 {
            return bytemuck::cast_slice_mut::<f32, u8>(out).copy_from_slice(bytes(row));
        }
        each(row, out, |out, number| *out = number);
    }
}

/// Codes as they are.
impl Element for u8 {
    fn read(row: &TensorView<'_>, out: &mut [u8]) {
        assert_eq!(row.dtype, ViewDtype::Fp8, "codes are sent of codes");
        out.copy_from_slice(bytes(row));
    }
}

/// The bytes of a view of one row.
fn bytes<'a>(row: &TensorView<'a>) -> &'a [u8] {
    row.row(0)
}

/// Hands over every number of a row.
fn each<T>(row: &TensorView<'_>, out: &mut [T], mut put: impl FnMut(&mut T, f32)) {
    let halves = || bytes(row).as_chunks::<2>().0.iter();
    match row.dtype {
        ViewDtype::F32 => {
            let numbers = bytes(row).as_chunks().0.iter().map(|&b| f32::from_le_bytes(b));
            out.iter_mut().zip(numbers).for_each(|(out, number)| put(out, number));
        }
        ViewDtype::F16 => {
            out.iter_mut().zip(halves()).for_each(|(out, &b)| put(out, f16::from_le_bytes(b).to_f32()));
        }
        ViewDtype::Bf16 => {
            out.iter_mut().zip(halves()).for_each(|(out, &b)| put(out, bf16::from_le_bytes(b).to_f32()));
        }
        ViewDtype::Fp8 | ViewDtype::Int4 => {
            (0..row.cols).zip(out).for_each(|(col, out)| put(out, row.narrow(0, col)));
        }
    }
}

impl Pinned {
    /// So many bytes, and at least one.
    pub(super) fn new(stream: &Arc<Stream>, bytes: usize) -> Result<Pinned> {
        const OP: &str = "pin memory";
        stream.bind(OP)?;
        let copied = Event::new(OP, stream, false)?;
        // SAFETY: it is freed in `drop`. Without the flag for combined writes, so that it may be read too.
        let start =
            unsafe { result::malloc_host(bytes.max(1), 0) }.map_err(|error| stream.failed(OP, error))?;
        Ok(Pinned { start: start.cast(), bytes, copied, stream: Arc::clone(stream) })
    }

    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Some of it, to which no copy is under way.
    pub(super) fn content(&self, range: Range<usize>) -> &[u8] {
        assert!(range.start <= range.end && range.end <= self.bytes, "{range:?} of {} bytes", self.bytes);
        // SAFETY: the memory is that large, as asserted, and initialised by the system where it was never written.
        unsafe { std::slice::from_raw_parts(self.start.add(range.start), range.len()) }
    }

    /// Some of it, to be written: no copy from there or to there is under way.
    pub(super) fn content_mut(&mut self, range: Range<usize>) -> &mut [u8] {
        assert!(range.start <= range.end && range.end <= self.bytes, "{range:?} of {} bytes", self.bytes);
        // SAFETY: as of `content`, and it is borrowed alone.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(range.start), range.len()) }
    }

    /// Queues a copy from the start of a device's memory to here.
    pub(super) fn fetch(&mut self, op: &'static str, from: &Memory, at: usize, bytes: usize) -> Result<()> {
        let stream = Arc::clone(&self.stream);
        let to = self.content_mut(at..at + bytes);
        // SAFETY: the memory is freed only behind the event, and who reads it waits for the copy.
        unsafe { stream.fetch(op, from, to) }?;
        self.copied.record(op)
    }

    /// Queues a copy of some bytes, which are put here first.
    pub(super) fn pass_on(
        &mut self,
        op: &'static str,
        bytes: &[u8],
        at: usize,
        to: &mut Memory,
    ) -> Result<()> {
        let range = at..at + bytes.len();
        self.content_mut(range.clone()).copy_from_slice(bytes);
        self.stream.upload(op, self.content(range), to, 0)
    }

    /// Marks a moment behind all copies so far, for [`Pinned::settle`].
    pub(super) fn mark(&self, op: &'static str) -> Result<()> {
        self.copied.record(op)
    }

    /// Waits for copies up to the last mark.
    pub(super) fn settle(&self) -> Result<()> {
        self.copied.wait("wait for copies")
    }

    /// So many numbers to be written, when the last copy from here is done.
    fn room<T: bytemuck::Pod>(&mut self, numbers: usize) -> Result<&mut [T]> {
        assert!(numbers * size_of::<T>() <= BUFFER_BYTES, "{numbers} numbers for a buffer");
        self.settle()?;
        // SAFETY: the buffer is that large and aligned to a page, any bits are a number, and nothing else reads or
        // writes it: the copy from it is done. What was never written is of no value, but initialised by the system.
        Ok(unsafe { std::slice::from_raw_parts_mut(self.start.cast(), numbers) })
    }

    fn send(&mut self, to: &mut Memory, at: usize, bytes: usize) -> Result<()> {
        const OP: &str = "send weights";
        // SAFETY: as of `room`, which has asserted the size; it is not written before the event.
        let bytes = unsafe { std::slice::from_raw_parts(self.start, bytes) };
        self.stream.upload(OP, bytes, to, at)?;
        self.copied.record(OP)
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        // What was passed on since the last mark too.
        if self.mark("free pinned memory").and_then(|()| self.settle()).is_ok() {
            // SAFETY: no copy from here is under way, and it was made in `new`.
            let _ = unsafe { result::free_host(self.start.cast()) };
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Condvar;
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_buffer_has_the_same_numbers_by_any_number_of_threads() {
        let (rows, cols) = (700, 301);
        let bytes: Vec<u8> = (0..rows * cols).flat_map(|i| (i as f32).to_le_bytes()).collect();
        let view = TensorView::new(ViewDtype::F32, rows, cols, &bytes);
        for columns in [0..304, 200..304, 302..304] {
            let number = |row: usize, col: usize| if col < cols { (row * cols + col) as f32 } else { 0.0 };
            let expected: Vec<f32> =
                (0..rows).flat_map(|row| columns.clone().map(move |col| number(row, col))).collect();
            for threads in [1, 2, 5] {
                let mut numbers = vec![f32::NAN; expected.len()];
                let pool = ThreadPool::new(&[], threads);
                fill(&pool, 0, columns.clone(), &mut numbers, &|row, columns, out| {
                    read(&view, row, columns, out);
                });
                assert!(numbers == expected, "{columns:?} by {threads} threads");
            }
        }
    }

    #[test]
    fn several_threads_fill_a_buffer_at_once() {
        let cols = TASK_BYTES / size_of::<u16>();
        let (writers, more) = (Mutex::new(0), Condvar::new());
        // Writes nothing, and waits until another thread is here too.
        let put = |_: usize, _: Range<usize>, _: &mut [u16]| {
            *locked(&writers) += 1;
            more.notify_all();
            let waited =
                more.wait_timeout_while(locked(&writers), Duration::from_secs(30), |count| *count < 2);
            assert!(!waited.unwrap().1.timed_out(), "one thread fills all of a buffer");
        };
        fill(&ThreadPool::new(&[], 2), 0, 0..cols, &mut vec![0; 2 * cols], &put);
    }
}
