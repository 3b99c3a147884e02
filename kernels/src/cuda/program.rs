//! Device code: its source, which is part of this program, and its compiling for the GPU that is there.
//!
//! NVRTC compiles in a few seconds what is not on disk yet. A cubin's name there is a hash of all that it was made from:
//! source, architecture, options and the compiler's version.

use std::ffi::{CStr, CString, c_char};
use std::path::Path;

use cudarc::nvrtc::{result, sys};

use super::{gpu, libraries, packed};
use crate::error::{Error, Result};

/// A file of device code.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Source {
    /// Its name in `kernels/cu`.
    pub file: &'static str,
    text: &'static str,
    /// Whether it is compiled once for each width of a head.
    pub is_per_head_dim: bool,
}

macro_rules! source {
    ($name:ident, $file:literal, $is_per_head_dim:literal) => {
        pub(crate) const $name: Source = Source {
            file: $file,
            text: include_str!(concat!("../../cu/", $file)),
            is_per_head_dim: $is_per_head_dim,
        };
    };
}

source!(ADD, "add.cu", false);
source!(COLLECTIVE, "collective.cu", false);
source!(EMBED, "embed.cu", false);
source!(GATHER, "gather.cu", false);
source!(RMS_NORM, "rms_norm.cu", false);
source!(ROPE, "rope.cu", false);
source!(KV_APPEND, "kv_append.cu", false);
source!(SWIGLU, "swiglu.cu", false);
source!(LOGIT_STATS, "logit_stats.cu", false);
source!(CHOOSE, "choose.cu", false);
source!(GEMM, "gemm.cu", false);
source!(RANDOM, "random.cu", false);
source!(GEMM_INT4, "gemm_int4.cu", false);
source!(QUANTIZE_INT4, "quantize_int4.cu", false);
source!(SHUFFLE_INT4, "shuffle_int4.cu", false);
source!(GEMM_FP8, "gemm_fp8.cu", false);
source!(QUANTIZE_FP8, "quantize_fp8.cu", false);
source!(ATTENTION_DECODE, "attention_decode.cu", true);
source!(ATTENTION_PREFILL, "attention_prefill.cu", true);
source!(ATTENTION_MERGE, "attention_merge.cu", false);

/// Of CUDA, as compilers and drivers have one: major and minor.
pub(crate) type Version = (i32, i32);

/// What files include.
const HEADERS: [(&CStr, &str); 7] = [
    (c"num.cuh", include_str!("../../cu/num.cuh")),
    (c"mma.cuh", include_str!("../../cu/mma.cuh")),
    (c"gemm.cuh", include_str!("../../cu/gemm.cuh")),
    (c"rope.cuh", include_str!("../../cu/rope.cuh")),
    (c"fp8.cuh", include_str!("../../cu/fp8.cuh")),
    (c"int4.cuh", include_str!("../../cu/int4.cuh")),
    (c"attention.cuh", include_str!("../../cu/attention.cuh")),
];

/// What NVRTC makes of a source.
#[derive(Debug, Clone)]
pub struct Compiled {
    /// Machine code for one architecture.
    pub cubin: Vec<u8>,
    /// What compiler and assembler said: with the assembler's word on registers where it was asked for.
    pub log: String,
}

impl Source {
    /// All device code.
    pub const ALL: [Source; 20] = [
        ADD,
        COLLECTIVE,
        EMBED,
        GATHER,
        RMS_NORM,
        ROPE,
        KV_APPEND,
        SWIGLU,
        LOGIT_STATS,
        CHOOSE,
        GEMM,
        RANDOM,
        GEMM_INT4,
        QUANTIZE_INT4,
        SHUFFLE_INT4,
        GEMM_FP8,
        QUANTIZE_FP8,
        ATTENTION_DECODE,
        ATTENTION_PREFILL,
        ATTENTION_MERGE,
    ];

    /// Compiles for an architecture such as `sm_90a`, with the assembler's account of registers and memory in the log.
    /// No GPU and no driver are needed. `head_dim` is 0 but for files that are compiled for each.
    ///
    /// # Errors
    /// No NVRTC, or the compiler's own words.
    pub fn compile(self, libraries: Option<&Path>, architecture: &str, head_dim: usize) -> Result<Compiled> {
        libraries::NVRTC.find(libraries)?;
        self.compile_with(&self.options(architecture, head_dim), true)
    }

    /// The cubin: the one that this program carries, or from disk where it is there.
    pub(crate) fn cubin(self, cubins: Option<&Path>, architecture: &str, head_dim: usize) -> Result<Vec<u8>> {
        let driver = gpu::driver_version()?;
        if packed::compiler().is_some_and(|version| is_taken(version, driver))
            && let Some(cubin) = packed::find(&self.key(architecture, head_dim))
        {
            return Ok(cubin.to_vec());
        }
        let options = self.options(architecture, head_dim);
        let name = self.cubin_name(&options, find_compiler(None)?);
        let path = cubins.map(|folder| folder.join(name));
        if let Some(cubin) = path.as_ref().and_then(|path| std::fs::read(path).ok()) {
            return Ok(cubin);
        }
        let Compiled { cubin, .. } = self.compile_with(&options, false)?;
        if let Some(path) = path {
            store(&path, &cubin);
        }
        Ok(cubin)
    }

    fn options(self, architecture: &str, head_dim: usize) -> Vec<String> {
        let mut options = vec!["-std=c++17".to_owned(), format!("--gpu-architecture={architecture}")];
        if self.is_per_head_dim {
            options.push(format!("-DHEAD_DIM={head_dim}"));
        }
        options
    }

    /// What a packed cubin is found by.
    pub(crate) fn key(self, architecture: &str, head_dim: usize) -> String {
        self.hashed(&self.options(architecture, head_dim), "any compiler")
    }

    fn cubin_name(self, options: &[String], compiler: Version) -> String {
        format!("{}.cubin", self.hashed(options, &format!("{}.{}", compiler.0, compiler.1)))
    }

    fn hashed(self, options: &[String], compiler: &str) -> String {
        let mut hash = blake3::Hasher::new();
        let headers = HEADERS.iter().map(|(_, text)| *text);
        let parts = [self.file, self.text, compiler].into_iter().chain(headers);
        for part in parts.chain(options.iter().map(String::as_str)) {
            hash.update(&(part.len() as u64).to_le_bytes());
            hash.update(part.as_bytes());
        }
        format!("{}-{}", self.file.trim_end_matches(".cu"), &hash.finalize().to_hex()[..32])
    }

    fn compile_with(self, options: &[String], tells_registers: bool) -> Result<Compiled> {
        let program = Program::new(self)?;
        let mut options = options.to_vec();
        if tells_registers {
            options.push("--ptxas-options=-v".to_owned());
        }
        // SAFETY: the program lives.
        let compiled = unsafe { result::compile_program(program.0, &options) };
        // SAFETY: as above, and it has been compiled.
        let log = unsafe { result::get_program_log(program.0) }.unwrap_or_default();
        let log: Vec<u8> = log.into_iter().map(|c| c as u8).take_while(|&c| c != 0).collect();
        let log = String::from_utf8_lossy(&log).into_owned();
        if let Err(error) = compiled {
            let message = format!("compile {} with {}: {error}\n{log}", self.file, options.join(" "));
            return Err(Error::NoCuda(message));
        }
        Ok(Compiled { cubin: program.cubin().map_err(|error| nvrtc(self.file, error))?, log })
    }
}

/// A program of NVRTC.
struct Program(sys::nvrtcProgram);

impl Program {
    fn new(source: Source) -> Result<Program> {
        let c_text = |text: &str| CString::new(text).expect("sources hold no zero");
        let (text, name) = (c_text(source.text), c_text(source.file));
        let headers = HEADERS.map(|(_, text)| c_text(text));
        let header_texts: Vec<*const c_char> = headers.iter().map(|text| text.as_ptr()).collect();
        let header_names: Vec<*const c_char> = HEADERS.iter().map(|(name, _)| name.as_ptr()).collect();
        let mut program = std::ptr::null_mut();
        // SAFETY: all texts end in a zero and outlive the call, and there are as many names as texts.
        unsafe {
            sys::nvrtcCreateProgram(
                &mut program,
                text.as_ptr(),
                name.as_ptr(),
                HEADERS.len() as i32,
                header_texts.as_ptr(),
                header_names.as_ptr(),
            )
        }
        .result()
        .map_err(|error| nvrtc(source.file, error))?;
        Ok(Program(program))
    }

    fn cubin(&self) -> std::result::Result<Vec<u8>, result::NvrtcError> {
        let mut size = 0;
        // SAFETY: the program has been compiled; it writes as many bytes as it says.
        unsafe {
            sys::nvrtcGetCUBINSize(self.0, &mut size).result()?;
            let mut cubin = vec![0u8; size];
            sys::nvrtcGetCUBIN(self.0, cubin.as_mut_ptr().cast()).result()?;
            Ok(cubin)
        }
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // SAFETY: it was created, and is destroyed once.
        let _ = unsafe { result::destroy_program(self.0) };
    }
}

/// Finds what has kernels for the driver: cubins that this program carries, or the compiler.
///
/// # Errors
/// Neither is there, or the driver is older than what is.
pub(crate) fn find_kernels(libraries: Option<&Path>) -> Result<()> {
    one_that_fits(gpu::driver_version()?, packed::compiler(), find_compiler(libraries))
}

/// What [`find_kernels`] says of a driver, of the compiler of carried cubins, and of the one that was looked for.
fn one_that_fits(driver: i32, packed: Option<Version>, compiler: Result<Version>) -> Result<()> {
    match (packed, compiler) {
        (Some(version), _) if is_taken(version, driver) => Ok(()),
        (_, Ok(_)) => Ok(()),
        (Some(version), Err(_)) => Err(too_old(
            driver,
            "this program carries kernels of",
            version,
            "install a newer driver, or nvidia-cuda-nvrtc of the driver's version",
        )),
        (None, Err(error)) => Err(error),
    }
}

/// Finds the compiler, with its version. The driver is running.
///
/// # Errors
/// It is missing, or the driver is too old for what it makes.
pub(crate) fn find_compiler(libraries: Option<&Path>) -> Result<Version> {
    libraries::NVRTC.find(libraries)?;
    let (version, driver) = (compiler_version()?, gpu::driver_version()?);
    match is_taken(version, driver) {
        true => Ok(version),
        false => {
            let cure = "install nvidia-cuda-nvrtc of the driver's version";
            Err(too_old(driver, "libnvrtc is of", version, cure))
        }
    }
}

/// Whether a driver takes what such a compiler has made: minor versions do not matter to it.
fn is_taken(compiler: Version, driver: i32) -> bool {
    compiler.0 <= driver / 1000
}

fn too_old(driver: i32, what: &str, (major, minor): Version, cure: &str) -> Error {
    let driver = gpu::version_name(driver);
    Error::NoCuda(format!(
        "driver too old: it is for CUDA {driver}, and {what} CUDA {major}.{minor}\nhint: {cure}"
    ))
}

/// Of the compiler, which is loaded.
pub(crate) fn compiler_version() -> Result<Version> {
    let (mut major, mut minor) = (0, 0);
    // SAFETY: the library is loaded, and writes two numbers.
    unsafe { sys::nvrtcVersion(&mut major, &mut minor) }
        .result()
        .map_err(|error| nvrtc("its version", error))?;
    Ok((major, minor))
}

fn nvrtc(what: &str, error: result::NvrtcError) -> Error {
    Error::NoCuda(format!("libnvrtc: {what}: {error}"))
}

/// Keeps a cubin, whole or not at all. Where that fails it is compiled again the next time.
fn store(path: &Path, cubin: &[u8]) {
    let Some(folder) = path.parent() else { return };
    let unfinished = path.with_extension(format!("{}.unfinished", std::process::id()));
    let written = std::fs::create_dir_all(folder).and_then(|()| std::fs::write(&unfinished, cubin));
    let _ = written.and_then(|()| std::fs::rename(&unfinished, path));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cubin_is_named_by_all_that_it_was_made_from() {
        let name = |source: Source, architecture, head_dim, compiler| {
            source.cubin_name(&source.options(architecture, head_dim), compiler)
        };
        let one = name(ATTENTION_DECODE, "sm_90a", 128, (13, 0));
        assert_eq!(one, name(ATTENTION_DECODE, "sm_90a", 128, (13, 0)));
        for other in [
            name(ATTENTION_PREFILL, "sm_90a", 128, (13, 0)),
            name(ATTENTION_DECODE, "sm_80", 128, (13, 0)),
            name(ATTENTION_DECODE, "sm_90a", 64, (13, 0)),
            name(ATTENTION_DECODE, "sm_90a", 128, (12, 9)),
        ] {
            assert_ne!(one, other);
        }
        assert!(one.starts_with("attention_decode-") && one.ends_with(".cubin"), "{one}");
    }

    #[test]
    fn a_driver_is_told_what_is_too_new_for_it() {
        let missing = || Err(Error::NoCuda("library missing: libnvrtc".to_owned()));
        let said = |driver, packed, compiler: Result<Version>| {
            one_that_fits(driver, packed, compiler).map_err(|error| error.to_string())
        };
        // Cubins of the driver's version need no compiler, and others give way to one that fits.
        assert_eq!(said(13_000, Some((13, 1)), missing()), Ok(()));
        assert_eq!(said(12_080, Some((13, 0)), Ok((12, 9))), Ok(()));
        assert_eq!(said(12_080, None, Ok((12, 9))), Ok(()));
        assert_eq!(said(12_080, None, missing()), Err("library missing: libnvrtc".to_owned()));
        let too_old = "driver too old: it is for CUDA 12.8, and this program carries kernels of CUDA 13.0\n\
                       hint: install a newer driver, or nvidia-cuda-nvrtc of the driver's version";
        assert_eq!(said(12_080, Some((13, 0)), missing()), Err(too_old.to_owned()));
    }
}
