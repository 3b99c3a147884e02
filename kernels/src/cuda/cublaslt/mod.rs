//! Matrix products by cuBLASLt: the fast path, whose bits depend on the batch.
//!
//! For products of one shape, rows counted in buckets, the library's heuristics are asked once, their candidates are timed
//! on the product itself, and the best is kept, also on disk. What the library cannot do is left to our own kernel, and so is what
//! does not begin where the library takes for granted.
//! The first product of a shape waits for the device; later ones are queued and nothing else, so that a step may be captured
//! once it has run.

mod calls;
mod file;
mod plan;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use super::gemm::Product;
use super::gpu::Gpu;
use super::stopwatch::{self, Effort, Stopwatch};
use super::stream::{Memory, Stream};
use super::{libraries, locked};
use crate::error::{Error, Result};
use calls::{Handle, Shape};
use file::{Owner, Plans};
use plan::{Algorithm, Choice, Key};

pub(crate) use calls::WORKSPACE_BYTES;
pub(crate) use plan::{Kind, cuts};

/// Runs of a candidate.
const TIMED: Effort = Effort { samples: 1, calls: 4 };

/// Workspaces that a survey has tried, from none to more than any algorithm is known to use.
const SURVEYED_MIB: [usize; 6] = [0, 4, 32, 64, 128, 256];
/// Most algorithms of a survey with each of them.
const SURVEYED_CANDIDATES: usize = 128;

/// cuBLASLt on one device.
#[derive(Debug)]
pub(crate) struct CublasLt {
    handle: Handle,
    owner: Owner,
    folder: Option<PathBuf>,
    known: Mutex<Known>,
    stream: Arc<Stream>,
}

#[derive(Debug)]
struct Known {
    plans: Plans,
    shapes: HashMap<Exact, Option<Prepared>>,
    /// What candidates write to while they are timed.
    scratch: Memory,
}

/// All that a shape is, in numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Exact {
    key: Key,
    rows: usize,
    strides: [usize; 3],
}

/// Shapes that are kept ready: when there are more all are made anew, which takes some calls on the host. A step has some sixteen
/// products, of as many numbers of rows as micro-batches have.
const MOST_SHAPES: usize = 4096;

const TIME: &str = "time a product";

/// A shape and its algorithm.
#[derive(Debug)]
struct Prepared {
    shape: Shape,
    algorithm: Algorithm,
}

impl CublasLt {
    /// Loads the library, and what has been chosen on this device with its version.
    ///
    /// # Errors
    /// It is nowhere, or does not start.
    pub(crate) fn load(
        stream: &Arc<Stream>,
        gpu: &Gpu,
        libraries: Option<&Path>,
        folder: Option<&Path>,
    ) -> Result<CublasLt> {
        libraries::CUBLASLT.find(libraries)?;
        let handle = Handle::new(stream, WORKSPACE_BYTES)?;
        let owner = Owner { library: handle.version(), device: gpu.name.clone() };
        let plans = folder.map_or_else(Plans::new, |folder| owner.load(folder));
        let known = Known { plans, shapes: HashMap::new(), scratch: Memory::none(stream) };
        Ok(CublasLt {
            handle,
            owner,
            folder: folder.map(Path::to_owned),
            known: Mutex::new(known),
            stream: Arc::clone(stream),
        })
    }

    /// Such as `cublaslt 13.1.0`.
    pub(crate) fn name(&self) -> String {
        let version = self.owner.library;
        format!("cublaslt {}.{}.{}", version / 10_000, version / 100 % 100, version % 100)
    }

    /// Whether the library has an algorithm on this device for products of E4M3 with a scale for each row.
    ///
    /// # Errors
    /// What it refuses to tell.
    pub(crate) fn takes_fp8(&self) -> Result<bool> {
        const NUMBERS: usize = 256;
        let memory = self.stream.allocate("ask cublasLt", NUMBERS * size_of::<f32>())?;
        let at = memory.start();
        let product = Product {
            x: at,
            w: at,
            out: at,
            rows: NUMBERS,
            cols: NUMBERS,
            // Of pairs.
            depth: NUMBERS / 2,
            x_stride: NUMBERS / 2,
            w_stride: NUMBERS / 2,
            out_stride: NUMBERS,
            scales: Some([at, at]),
        };
        let Some(shape) = self.handle.shape(Kind::Fp8, &product)? else { return Ok(false) };
        Ok(!self.handle.candidates(&shape, 1)?.is_empty())
    }

    /// Queues a product, which `adds` to what is there or takes its place; `false` where the library cannot.
    ///
    /// # Safety
    /// The product's arrays are of this device, and as large as its shape says.
    pub(crate) unsafe fn run(
        &self,
        op: &'static str,
        kind: Kind,
        product: &Product,
        adds: bool,
    ) -> Result<bool> {
        let is_empty = product.rows == 0 || product.cols == 0 || product.depth == 0;
        if is_empty || !calls::begins_at_multiples_of(plan::ALIGNMENT, product) {
            return Ok(false);
        }
        let Product { rows, cols, depth, x_stride, w_stride, out_stride, .. } = *product;
        let key = Key { kind, rows: plan::bucket(rows), cols, depth, adds };
        let exact = Exact { key, rows, strides: [x_stride, w_stride, out_stride] };
        let mut known = locked(&self.known);
        if !known.shapes.contains_key(&exact) {
            // SAFETY: the caller vouches for the arrays.
            let prepared = unsafe { self.prepare(&mut known, key, product) }?;
            if known.shapes.len() >= MOST_SHAPES {
                known.shapes.clear();
            }
            known.shapes.insert(exact, prepared);
        }
        let Some(Prepared { shape, algorithm }) = &known.shapes[&exact] else { return Ok(false) };
        // SAFETY: the caller vouches for the arrays, and the shape is the product's.
        unsafe { self.handle.multiply(op, shape, product, adds, *algorithm) }?;
        Ok(true)
    }

    /// Finds a shape's algorithm: the key's, which is chosen now where it is not known.
    ///
    /// # Safety
    /// As of [`CublasLt::run`].
    unsafe fn prepare(&self, known: &mut Known, key: Key, product: &Product) -> Result<Option<Prepared>> {
        let Some(shape) = self.handle.shape(key.kind, product)? else { return Ok(None) };
        if let Some(choice) = known.plans.get(&key)
            && self.handle.accepts(&shape, choice.algorithm)
        {
            let algorithm = choice.algorithm;
            return Ok(Some(Prepared { shape, algorithm }));
        }
        let candidates = self.handle.candidates(&shape, plan::MOST_CANDIDATES)?;
        if let Err(error) = known.scratch.reserve(TIME, product.rows * product.out_stride * size_of::<f32>())
        {
            // The library's own first choice has to do, which is kept nowhere.
            let first = candidates.first().filter(|_| matches!(error, Error::OutOfMemory { .. }));
            return first.map(|&algorithm| Some(Prepared { shape, algorithm })).ok_or(error);
        }
        let watch = Stopwatch::new(self.handle.workspace())?;
        let products = std::slice::from_ref(product);
        // SAFETY: the caller vouches for the arrays.
        let times = candidates.iter().map(|&algorithm| unsafe {
            time(&watch, &self.handle, &mut known.scratch, &shape, products, key.adds, (algorithm, TIMED))
        });
        let times = times.collect::<Result<Vec<_>>>()?;
        let Some(best) = plan::fastest(&times) else { return Ok(None) };
        let algorithm = candidates[best];
        let choice = Choice { algorithm, microseconds: times[best].expect("the fastest has a time") };
        known.plans.insert(key, choice);
        if let Some(folder) = &self.folder {
            self.owner.keep(folder, key, choice);
        }
        Ok(Some(Prepared { shape, algorithm }))
    }

    /// The fastest of all algorithms that the library's heuristics name for products of bf16 of one shape that take turns, with workspaces of
    /// [`SURVEYED_MIB`]: microseconds of each, and how many were timed. The best with each workspace is timed as thoroughly as what is held
    /// against it. Nothing where there is none.
    ///
    /// # Safety
    /// As of [`CublasLt::run`].
    pub(crate) unsafe fn survey(&self, products: &[Product]) -> Result<Option<(f64, usize)>> {
        let Some(shape) = self.handle.shape(Kind::Bf16, &products[0])? else { return Ok(None) };
        let mut scratch = Memory::none(&self.stream);
        let (mut best, mut count): (Option<f64>, usize) = (None, 0);
        let watch = Stopwatch::new(self.handle.workspace())?;
        for mib in SURVEYED_MIB {
            let handle = Handle::new(&self.stream, mib << 20)?;
            let candidates = handle.candidates(&shape, SURVEYED_CANDIDATES)?;
            // SAFETY: the caller vouches for the arrays.
            let mut time = |algorithm, effort| unsafe {
                time(&watch, &handle, &mut scratch, &shape, products, false, (algorithm, effort))
            };
            let times = candidates.iter().map(|&algorithm| time(algorithm, TIMED));
            let times = times.collect::<Result<Vec<_>>>()?;
            count += times.iter().flatten().count();
            if let Some(at) = plan::fastest(&times) {
                best = best.into_iter().chain(time(candidates[at], stopwatch::THOROUGH)?).reduce(f64::min);
            }
        }
        Ok(best.map(|best| (best, count)))
    }
}

/// Microseconds of a candidate at one of some products that take turns, or nothing where the library refuses to start it.
///
/// # Safety
/// As of [`CublasLt::run`]; the products are of one shape, which is `shape`'s.
unsafe fn time(
    watch: &Stopwatch<'_>,
    handle: &Handle,
    scratch: &mut Memory,
    shape: &Shape,
    products: &[Product],
    adds: bool,
    (algorithm, effort): (Algorithm, Effort),
) -> Result<Option<f64>> {
    scratch.reserve(TIME, products[0].rows * products[0].out_stride * size_of::<f32>())?;
    let out = scratch.start();
    let mut turns = products.iter().map(|product| Product { out, ..*product }).cycle();
    let mut run = || {
        let product = turns.next().expect("a cycle of some has no end");
        // SAFETY: the caller vouches for the arrays, and the scratch is as large as what it stands for.
        unsafe { handle.multiply(TIME, shape, &product, adds, algorithm) }
    };
    if run().is_err() {
        return Ok(None);
    }
    Ok(Some(watch.seconds(effort, run)? * 1e6))
}
