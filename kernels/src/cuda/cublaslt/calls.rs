//! The library's calls, each with an owner for what it makes.

use std::ffi::c_void;
use std::sync::Arc;

use cudarc::cublaslt::{result, sys};

use super::plan::{Algorithm, Kind};
use crate::cuda::gemm::Product;
use crate::cuda::stream::{Argument, Memory, Stream};
use crate::error::{Error, Result};

/// Memory that an algorithm may work in: what NVIDIA recommends for Hopper is 32 MiB.
pub(crate) const WORKSPACE_BYTES: usize = 64 << 20;

/// CUBLAS_OP_T, which cudarc's bindings have beside another library.
const TRANSPOSED: i32 = 1;

/// The library, on one device.
#[derive(Debug)]
pub(crate) struct Handle {
    handle: sys::cublasLtHandle_t,
    workspace: Memory,
    workspace_bytes: usize,
    stream: Arc<Stream>,
}

// SAFETY: the library's calls may be made from any thread, and ours make the device the thread's first.
unsafe impl Send for Handle {}
// SAFETY: a handle may be used by several threads at once.
unsafe impl Sync for Handle {}

/// A product of one shape as the library has it.
///
/// Its matrices are columns after columns, so that ours, which are rows after rows, are their transposes: what is computed is
/// `outᵀ [cols, rows] = w · xᵀ`, of A = `wᵀ [depth, cols]`, which is transposed, and B = `xᵀ [depth, rows]`.
#[derive(Debug)]
pub(crate) struct Shape {
    product: Descriptor,
    a: Layout,
    b: Layout,
    out: Layout,
}

#[derive(Debug)]
struct Descriptor(sys::cublasLtMatmulDesc_t);

#[derive(Debug)]
struct Layout(sys::cublasLtMatrixLayout_t);

#[derive(Debug)]
struct Preference(sys::cublasLtMatmulPreference_t);

// SAFETY: what they point to is owned, and bound to no thread.
unsafe impl Send for Descriptor {}
// SAFETY: as above.
unsafe impl Send for Layout {}

impl Handle {
    /// With so many bytes for algorithms to work in; the library has been loaded.
    pub(crate) fn new(stream: &Arc<Stream>, workspace_bytes: usize) -> Result<Handle> {
        stream.bind("start cublasLt")?;
        let workspace = stream.allocate("workspace of cublasLt", workspace_bytes)?;
        let handle = result::create_handle().map_err(|error| failed(stream, "start cublasLt", error))?;
        Ok(Handle { handle, workspace, workspace_bytes, stream: Arc::clone(stream) })
    }

    /// What algorithms work in, and nobody keeps anything in.
    pub(crate) fn workspace(&self) -> &Memory {
        &self.workspace
    }

    /// The library's version, such as 130100.
    pub(crate) fn version(&self) -> usize {
        // SAFETY: the library is loaded.
        unsafe { sys::cublasLtGetVersion() }
    }

    /// What the heuristics hold to be fastest, best first and so many at most; nothing where the library has no algorithm.
    pub(crate) fn candidates(&self, shape: &Shape, most: usize) -> Result<Vec<Algorithm>> {
        const OP: &str = "ask cublasLt";
        self.stream.bind(OP)?;
        let preference =
            Preference::new(self.workspace_bytes).map_err(|error| failed(&self.stream, OP, error))?;
        let mut found = vec![std::mem::MaybeUninit::<sys::cublasLtMatmulHeuristicResult_t>::zeroed(); most];
        let mut count = 0;
        // SAFETY: all descriptors live, and there is room for as many results as are asked for.
        let status = unsafe {
            sys::cublasLtMatmulAlgoGetHeuristic(
                self.handle,
                shape.product.0,
                shape.a.0,
                shape.b.0,
                shape.out.0,
                shape.out.0,
                preference.0,
                most as i32,
                found.as_mut_ptr().cast(),
                &mut count,
            )
        };
        if status == sys::cublasStatus_t::CUBLAS_STATUS_NOT_SUPPORTED {
            return Ok(Vec::new());
        }
        status.result().map_err(|error| failed(&self.stream, OP, error))?;
        // SAFETY: the library has written so many; zeros, which the others are, are results too.
        let found = found[..count as usize].iter().map(|result| unsafe { result.assume_init() });
        let is_good = |result: &sys::cublasLtMatmulHeuristicResult_t| {
            result.state == sys::cublasStatus_t::CUBLAS_STATUS_SUCCESS
                && result.workspaceSize <= self.workspace_bytes
        };
        Ok(found.filter(is_good).map(|result| Algorithm(result.algo.data)).collect())
    }

    /// Whether an algorithm, chosen for another number of rows or by another run, is good for this shape.
    pub(crate) fn accepts(&self, shape: &Shape, algorithm: Algorithm) -> bool {
        let mut result = std::mem::MaybeUninit::<sys::cublasLtMatmulHeuristicResult_t>::zeroed();
        let algorithm = sys::cublasLtMatmulAlgo_t { data: algorithm.0 };
        // SAFETY: all descriptors live, and the library writes one result.
        unsafe {
            let status = sys::cublasLtMatmulAlgoCheck(
                self.handle,
                shape.product.0,
                shape.a.0,
                shape.b.0,
                shape.out.0,
                shape.out.0,
                &algorithm,
                result.as_mut_ptr(),
            );
            status == sys::cublasStatus_t::CUBLAS_STATUS_SUCCESS
                && result.assume_init().workspaceSize <= self.workspace_bytes
        }
    }

    /// Queues a product; `adds` it to what is there.
    ///
    /// # Safety
    /// The product's arrays are of this device, and as large as its shape says, which is `shape`'s.
    pub(crate) unsafe fn multiply(
        &self,
        op: &'static str,
        shape: &Shape,
        product: &Product,
        adds: bool,
        algorithm: Algorithm,
    ) -> Result<()> {
        self.stream.bind(op)?;
        if let Some(scales) = product.scales {
            // One shape serves several matrices.
            shape.product.set_scales(scales).map_err(|error| failed(&self.stream, op, error))?;
        }
        let (alpha, beta) = (1.0f32, if adds { 1.0f32 } else { 0.0 });
        let algorithm = sys::cublasLtMatmulAlgo_t { data: algorithm.0 };
        // SAFETY: the caller vouches for the arrays, and one stream has one workspace.
        unsafe {
            result::matmul(
                self.handle,
                shape.product.0,
                std::ptr::from_ref(&alpha).cast(),
                std::ptr::from_ref(&beta).cast(),
                pointer(product.w),
                shape.a.0,
                pointer(product.x),
                shape.b.0,
                pointer(product.out),
                shape.out.0,
                pointer(product.out),
                shape.out.0,
                &algorithm,
                pointer(self.workspace.start()),
                self.workspace_bytes,
                self.stream.handle().cast(),
            )
        }
        .map_err(|error| failed(&self.stream, op, error))
    }

    /// A product's shape.
    ///
    /// # Errors
    /// What the library refuses; nothing where it does not know the kind.
    pub(crate) fn shape(&self, kind: Kind, product: &Product) -> Result<Option<Shape>> {
        match Shape::new(kind, product) {
            Ok(shape) => Ok(Some(shape)),
            // Before CUDA 12.9 there are no scales for rows.
            Err(_) if kind == Kind::Fp8 => Ok(None),
            Err(error) => Err(failed(&self.stream, "describe a product", error)),
        }
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        if self.stream.wait("stop cublasLt").is_ok() {
            // SAFETY: it was created once, and nothing that is queued uses it any more.
            let _ = unsafe { result::destroy_handle(self.handle) };
        }
    }
}

impl Shape {
    fn new(kind: Kind, product: &Product) -> std::result::Result<Shape, result::CublasError> {
        let f32s = sys::cudaDataType::CUDA_R_32F;
        let numbers = match kind {
            Kind::Bf16 => sys::cudaDataType::CUDA_R_16BF,
            Kind::Fp8 => sys::cudaDataType::CUDA_R_8F_E4M3,
        };
        // Ours count pairs of E4M3.
        let each = if kind == Kind::Fp8 { 2 } else { 1 };
        let Product { rows, cols, depth, x_stride, w_stride, out_stride, .. } = *product;
        let descriptor =
            Descriptor(result::create_matmul_desc(sys::cublasComputeType_t::CUBLAS_COMPUTE_32F, f32s)?);
        descriptor.set(sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_TRANSA, &TRANSPOSED)?;
        if let Some(scales) = product.scales {
            descriptor.set_scales(scales)?;
        }
        Ok(Shape {
            product: descriptor,
            a: Layout::new(numbers, each * depth, cols, each * w_stride)?,
            b: Layout::new(numbers, each * depth, rows, each * x_stride)?,
            out: Layout::new(f32s, cols, rows, out_stride)?,
        })
    }
}

impl Descriptor {
    /// Where the scales of x and w are: one in f32 for each of their rows.
    fn set_scales(&self, [x, w]: [Argument; 2]) -> std::result::Result<(), result::CublasError> {
        use sys::cublasLtMatmulDescAttributes_t as Attribute;
        let mode = sys::cublasLtMatmulMatrixScale_t::CUBLASLT_MATMUL_MATRIX_SCALE_OUTER_VEC_32F as i32;
        self.set(Attribute::CUBLASLT_MATMUL_DESC_A_SCALE_MODE, &mode)?;
        self.set(Attribute::CUBLASLT_MATMUL_DESC_B_SCALE_MODE, &mode)?;
        self.set(Attribute::CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, &pointer(w))?;
        self.set(Attribute::CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, &pointer(x))
    }

    fn set<T: Copy>(
        &self,
        attribute: sys::cublasLtMatmulDescAttributes_t,
        value: &T,
    ) -> std::result::Result<(), result::CublasError> {
        // SAFETY: the descriptor lives, and the value is copied.
        unsafe {
            result::set_matmul_desc_attribute(
                self.0,
                attribute,
                std::ptr::from_ref(value).cast(),
                size_of::<T>(),
            )
        }
    }
}

impl Drop for Descriptor {
    fn drop(&mut self) {
        // SAFETY: it was created once.
        let _ = unsafe { result::destroy_matmul_desc(self.0) };
    }
}

impl Layout {
    fn new(
        numbers: sys::cudaDataType,
        rows: usize,
        cols: usize,
        stride: usize,
    ) -> std::result::Result<Layout, result::CublasError> {
        Ok(Layout(result::create_matrix_layout(numbers, rows as u64, cols as u64, stride as i64)?))
    }
}

impl Drop for Layout {
    fn drop(&mut self) {
        // SAFETY: it was created once.
        let _ = unsafe { result::destroy_matrix_layout(self.0) };
    }
}

impl Preference {
    fn new(workspace_bytes: usize) -> std::result::Result<Preference, result::CublasError> {
        let preference = Preference(result::create_matmul_pref()?);
        let attribute = sys::cublasLtMatmulPreferenceAttributes_t::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES;
        let bytes = workspace_bytes as u64;
        // SAFETY: the preference lives, and the value is copied.
        unsafe {
            result::set_matmul_pref_attribute(
                preference.0,
                attribute,
                std::ptr::from_ref(&bytes).cast(),
                size_of::<u64>(),
            )?;
        }
        Ok(preference)
    }
}

impl Drop for Preference {
    fn drop(&mut self) {
        // SAFETY: it was created once.
        let _ = unsafe { result::destroy_matmul_pref(self.0) };
    }
}

/// Whether each matrix of a product begins at a multiple of so many bytes.
pub(crate) fn begins_at_multiples_of(bytes: usize, product: &Product) -> bool {
    [product.x, product.w, product.out].into_iter().all(|at| pointer(at).addr().is_multiple_of(bytes))
}

fn pointer(argument: Argument) -> *mut c_void {
    match argument {
        Argument::Pointer(address) => address as *mut c_void,
        other => unreachable!("{other:?} is no pointer"),
    }
}

fn failed(stream: &Stream, op: &'static str, error: result::CublasError) -> Error {
    Error::Cuda { device: stream.index(), op, message: format!("cublasLt: {:?}", error.0) }
}
