//! The battery: every operation of the contract, on every backend and SIMD level that this machine has, in
//! every number type, against plain loops in f64; and the contract's invariant that rows are independent
//! to the bit.
//!
//! A backend joins by an entry in [`device::every_device`]; a GPU has its own list in [`cuda`], for it may not be there.

mod battery {
    pub(crate) mod attend;
    pub(crate) mod attention;
    pub(crate) mod attention_invariants;
    pub(crate) mod checkpoints;
    pub(crate) mod choose;
    pub(crate) mod cuda;
    pub(crate) mod device;
    pub(crate) mod draws;
    pub(crate) mod embed_gather;
    pub(crate) mod exact;
    pub(crate) mod handing_over;
    pub(crate) mod logit_stats;
    pub(crate) mod long_context;
    pub(crate) mod matmul;
    pub(crate) mod matmul_argmax;
    pub(crate) mod profile;
    pub(crate) mod random;
    pub(crate) mod refusals;
    pub(crate) mod rms_norm;
    pub(crate) mod rope;
    pub(crate) mod row_invariants;
    pub(crate) mod swiglu;
}
