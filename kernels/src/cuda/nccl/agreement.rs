//! How ranks tell each other what they are about to do, by a group of the host's.

use super::row;
use crate::array::Array;
use crate::collective::{Axis, Collective, Op};
use crate::error::Error;

/// Numbers are told as f32, in which those below are exact.
const MOST: usize = 1 << 24;

/// The ranks' way to agree on what comes.
pub(super) struct Agreement {
    pub(super) control: Box<dyn Collective<Array>>,
    own: Array,
    all: Array,
    /// Why the group has ended.
    pub(super) end: Option<String>,
}

/// What a rank is about to do.
#[derive(Debug, Clone, Copy)]
pub(super) struct Told {
    /// An [`Op`], by its number.
    pub(super) op: u32,
    /// That of its array.
    pub(super) shape: [usize; 2],
    /// For so many numbers it has memory, where some come from others.
    pub(super) room: usize,
}

impl Agreement {
    pub(super) fn new(control: Box<dyn Collective<Array>>) -> Agreement {
        Agreement { control, own: row(&[0.0; 5]), all: Array::new(), end: None }
    }

    /// Tells the others what this rank is about to do; what all are. An error says why they cannot.
    pub(super) fn tell(&mut self, op: Op, shape: [usize; 2], room: usize) -> Result<Vec<Told>, String> {
        if let Some(end) = &self.end {
            return Err(end.clone());
        }
        let numbers = [op as usize, shape[0], shape[1], room / MOST, room % MOST];
        assert!(numbers.iter().all(|number| *number < MOST), "{numbers:?} are told as f32");
        self.own.values_mut().copy_from_slice(&numbers.map(|number| number as f32));
        self.control.all_gather(Axis::Rows, &self.own, &mut self.all).map_err(|error| match error {
            Error::Collective { message, .. } => message,
            other => other.to_string(),
        })?;
        let (calls, []) = self.all.values().as_chunks::<5>() else { unreachable!("each rank tells five") };
        Ok(calls.iter().map(|call| Told::read(call.map(|number| number as usize))).collect())
    }
}

impl Told {
    fn read([op, rows, cols, high, low]: [usize; 5]) -> Told {
        Told { op: op as u32, shape: [rows, cols], room: high * MOST + low }
    }
}
