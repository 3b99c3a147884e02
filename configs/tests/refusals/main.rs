//! Job files and overrides that are refused, each with the whole of its message.

mod case;
mod devices_and_sampling;
mod syntax;
mod values;
mod whole;
