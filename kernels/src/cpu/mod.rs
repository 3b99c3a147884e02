//! The fast CPU backend: vectorised, threaded, tiled.

pub(crate) mod exp;
pub(crate) mod gemm;
pub(crate) mod pool;
pub(crate) mod simd;
