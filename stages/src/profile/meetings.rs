//! What ranks of a stage take to tell each other the residual stream, or their columns of it, with nothing between two calls.

use std::time::{Duration, Instant};

use kernels::{Array, Axis, Collective, ThreadRank, thread_ranks};

use super::measure::Effort;
use super::points::Seconds;
use crate::error::Result;
use crate::shard::RankPlace;
use crate::stage::{self, Device, Dtypes};

/// A call that takes longer than this is none that anybody would plan with.
const PATIENCE: Duration = Duration::from_secs(60);

/// Calls of one kind and size, at most.
const MAX_CALLS: usize = 200;

/// The times of one kind of call, for each number of rows.
pub(super) struct Times {
    pub(super) all_reduce: Vec<Seconds>,
    pub(super) all_gather: Vec<Seconds>,
    pub(super) broadcast: Vec<Seconds>,
}

/// Measures calls about `[rows, hidden]` between CPU devices.
///
/// # Errors
/// What a device refuses.
pub(super) fn times(
    devices: &[Device],
    dtypes: Dtypes,
    hidden: usize,
    rows: &[usize],
    effort: Effort,
) -> Result<Times> {
    let ranks = thread_ranks(devices.len(), PATIENCE);
    let results: Vec<Result<Times>> = std::thread::scope(|scope| {
        let start = |(rank, device): (ThreadRank, &Device)| {
            let device = device.clone();
            scope.spawn(move || on_device(rank, &device, dtypes, hidden, rows, effort))
        };
        let threads: Vec<_> = ranks.into_iter().zip(devices).map(start).collect();
        threads.into_iter().map(|thread| thread.join().expect("a rank's thread panicked")).collect()
    });
    // Whoever is last decides how long a call takes, and all are in it for as long.
    results.into_iter().next().expect("a stage has a rank")
}

fn on_device(
    mut rank: ThreadRank,
    device: &Device,
    dtypes: Dtypes,
    hidden: usize,
    rows: &[usize],
    effort: Effort,
) -> Result<Times> {
    // It is the devices' cores that talk.
    let _pool = match device {
        Device::Cpu { .. } => Some(stage::cpu(device, dtypes)?),
        Device::Reference | Device::Cuda { .. } => None,
    };
    let mut all_reduce = |rows| repeat(&mut rank, rows, hidden, effort, |rank, x| rank.all_reduce(x));
    let all_reduce = rows.iter().map(|rows| all_reduce(*rows)).collect::<Result<_>>()?;
    // A rank's columns of what a linear half gives.
    let place = RankPlace { rank: rank.rank(), num_ranks: rank.num_ranks() };
    let columns = place.columns(0..hidden).unwrap_or_else(|| place.share(hidden)).len();
    let mut all_gather = |rows| {
        let part = array(rows, columns);
        repeat(&mut rank, rows, hidden, effort, |rank, x| rank.all_gather(Axis::Columns, &part, x))
    };
    let all_gather = rows.iter().map(|rows| all_gather(*rows)).collect::<Result<_>>()?;
    let mut broadcast = |rows| repeat(&mut rank, rows, hidden, effort, |rank, x| rank.broadcast(0, x));
    let broadcast = rows.iter().map(|rows| broadcast(*rows)).collect::<Result<_>>()?;
    Ok(Times { all_reduce, all_gather, broadcast })
}

/// Times of one call. The first rank tells the others how often it comes.
fn repeat(
    rank: &mut ThreadRank,
    rows: usize,
    hidden: usize,
    effort: Effort,
    call: impl Fn(&mut ThreadRank, &mut Array) -> kernels::Result<()>,
) -> Result<Seconds> {
    let mut x = array(rows, hidden);
    let mut time = |rank: &mut ThreadRank| -> Result<f64> {
        let begun = Instant::now();
        call(rank, &mut x)?;
        Ok(begun.elapsed().as_secs_f64())
    };
    time(rank)?; // Arrays find their size.
    let wanted = (effort.point_seconds / time(rank)?.max(1e-9)) as usize;
    let mut count = array(1, 1);
    count.values_mut()[0] = wanted.clamp(effort.least_repeats, MAX_CALLS) as f32;
    rank.broadcast(0, &mut count)?;
    let times = (0..count.values()[0] as usize).map(|_| time(rank)).collect::<Result<_>>()?;
    Ok(Seconds::of(times))
}

fn array(rows: usize, cols: usize) -> Array {
    let mut array = Array::new();
    array.reshape(rows, cols);
    array.values_mut().fill(0.0);
    array
}
