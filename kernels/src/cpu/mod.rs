//! The fast CPU backend: vectorised, threaded, tiled.

pub(crate) mod pool;
pub(crate) mod simd;
