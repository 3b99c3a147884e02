//! Placeholder docs replaced below.
#![forbid(unsafe_code)]
