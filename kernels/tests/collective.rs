//! One battery for all that makes a group of ranks: the operations, their order of sums, and what becomes of ranks when
//! one of them dies, hangs or disagrees.

use std::net::{Ipv4Addr, TcpListener};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use kernels::{
    Array, Axis, Backend, Collective, Cuda, CudaArray, CudaOptions, Error, GroupExit, KvDtype, NcclRank,
    Result, TcpRank, WeightType, thread_ranks,
};

/// Longer than any machine keeps a thread waiting.
const LONG: Duration = Duration::from_secs(60);

type Rank = Box<dyn Collective<Array>>;

/// What makes groups of ranks, by their number and their patience.
pub(crate) struct Groups<'a> {
    pub(crate) name: &'a str,
    pub(crate) make: &'a (dyn Fn(usize, Duration) -> Vec<Rank> + Sync),
    /// The most ranks that it makes a group of.
    pub(crate) most: usize,
}

/// A question to what makes groups.
pub(crate) type Check = fn(&Groups<'_>);

/// All checks of GPUs, for a program that has no test harness: what each is called, and the check of what makes groups. Each
/// needs groups of two at least to ask what its name says.
#[allow(dead_code, reason = "tests have a function each")]
pub(crate) const CHECKS: [(&str, Check); 8] = [
    ("sums_are_added_in_the_order_of_ranks_at_every_call", sums),
    ("sums_that_are_begun_in_pieces_are_the_same", pieces),
    ("parts_of_unlike_sizes_lie_side_by_side_in_the_order_of_ranks", parts),
    ("everyone_has_what_the_root_had", roots),
    ("a_rank_that_dies_ends_the_calls_of_all_others_at_once", deaths),
    ("a_rank_that_hangs_ends_the_calls_of_all_others_when_their_patience_does", hangs),
    ("ranks_that_disagree_are_told_so_on_every_rank", disagreements),
    ("gpus_hear_of_a_rank_without_room_and_go_on", ranks_without_room),
];

/// Those that ask something of a rank alone too: that its numbers come back as they were.
#[allow(dead_code, reason = "tests have a function each")]
pub(crate) const CHECKS_OF_ONE: [Check; 4] = [sums, pieces, parts, roots];

fn threads(num_ranks: usize, patience: Duration) -> Vec<Rank> {
    thread_ranks(num_ranks, patience).into_iter().map(|rank| Box::new(rank) as Rank).collect()
}

fn tcp(num_ranks: usize, patience: Duration) -> Vec<Rank> {
    static GROUPS: AtomicU64 = AtomicU64::new(7);
    let group = GROUPS.fetch_add(1, Ordering::Relaxed);
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let leader = listener.local_addr().unwrap();
    let join = move |rank| {
        std::thread::spawn(move || TcpRank::join(leader, rank, num_ranks, group, patience).unwrap())
    };
    let others: Vec<_> = (1..num_ranks).map(join).collect();
    let mut ranks =
        vec![Box::new(TcpRank::lead(&listener, num_ranks, group, patience, || None).unwrap()) as Rank];
    ranks.extend(others.into_iter().map(|other| Box::new(other.join().unwrap()) as Rank));
    ranks
}

/// A rank that is a GPU, as the battery sees it: its arrays come from the host and go back there.
struct OnGpu {
    rank: NcclRank,
    x: CudaArray,
    out: CudaArray,
    values: Vec<f32>,
    cuda: Cuda,
    // Behind the rank, which leaves its group.
    _left: Left,
}

/// The way out of a group. Dropped, waits until NCCL has freed what it had for it: the program may end next.
#[derive(Default)]
struct Left(GroupExit);

impl Drop for Left {
    fn drop(&mut self) {
        self.0.has_freed_within(LONG);
    }
}

impl OnGpu {
    fn new(libraries: Option<PathBuf>, control: Rank) -> Result<OnGpu> {
        let left = Left::default();
        let cuda = Cuda::new(CudaOptions {
            device: 0,
            weights: WeightType::Bf16,
            kv: KvDtype::Bf16,
            is_deterministic: true,
            has_graphs: false,
            ffn_columns: Cuda::FFN_COLUMNS,
            libraries,
            cubins: None,
        })?;
        let rank = NcclRank::join(&cuda, control, &left.0)?;
        Ok(OnGpu { rank, x: cuda.array(), out: cuda.array(), values: Vec::new(), cuda, _left: left })
    }

    fn upload(&mut self, x: &Array) -> Result<()> {
        self.cuda.upload(x.values(), x.rows(), x.cols(), &mut self.x)
    }

    fn download(&mut self, is_out: bool, to: &mut Array) -> Result<()> {
        let from = if is_out { &self.out } else { &self.x };
        self.cuda.download(from, &mut self.values)?;
        to.reshape(from.rows(), from.cols());
        to.values_mut().copy_from_slice(&self.values);
        Ok(())
    }
}

impl Collective<Array> for OnGpu {
    fn rank(&self) -> usize {
        self.rank.rank()
    }

    fn num_ranks(&self) -> usize {
        self.rank.num_ranks()
    }

    fn all_reduce(&mut self, x: &mut Array) -> Result<()> {
        self.upload(x)?;
        self.rank.all_reduce(&mut self.x)?;
        self.download(false, x)
    }

    fn pieces(&self, rows: usize) -> Vec<Range<usize>> {
        self.rank.pieces(rows)
    }

    fn begin_all_reduce(&mut self, x: &Array, piece: Range<usize>) -> Result<()> {
        if piece.start == 0 {
            self.upload(x)?;
        }
        self.rank.begin_all_reduce(&self.x, piece)
    }

    fn finish_all_reduce(&mut self, x: &mut Array) -> Result<()> {
        self.rank.finish_all_reduce(&mut self.x)?;
        self.download(false, x)
    }

    fn all_gather(&mut self, axis: Axis, part: &Array, out: &mut Array) -> Result<()> {
        self.upload(part)?;
        self.rank.all_gather(axis, &self.x, &mut self.out)?;
        self.download(true, out)
    }

    fn gather(&mut self, axis: Axis, part: &Array, out: &mut Array) -> Result<()> {
        self.upload(part)?;
        self.rank.gather(axis, &self.x, &mut self.out)?;
        if self.rank() == 0 { self.download(true, out) } else { Ok(()) }
    }

    fn broadcast(&mut self, root: usize, x: &mut Array) -> Result<()> {
        self.upload(x)?;
        self.rank.broadcast(root, &mut self.x)?;
        self.download(false, x)
    }

    fn end_step(&mut self, has_room: bool) -> Result<()> {
        self.rank.end_step(has_room)
    }
}

/// Ranks on GPUs, or all on one, which agree by threads.
///
/// # Errors
/// No NCCL, or what it refuses.
pub(crate) fn on_gpus(libraries: Option<&Path>, num_ranks: usize, patience: Duration) -> Result<Vec<Rank>> {
    agreeing_by(threads(num_ranks, patience), libraries)
}

fn agreeing_by(control: Vec<Rank>, libraries: Option<&Path>) -> Result<Vec<Rank>> {
    let join = |control| Ok(Box::new(OnGpu::new(libraries.map(Path::to_owned), control)?) as Rank);
    on_threads(control, join).into_iter().collect()
}

/// GPUs of an emulator.
fn nccl(num_ranks: usize, patience: Duration) -> Vec<Rank> {
    on_gpus(Some(&emulator()), num_ranks, patience).unwrap()
}

/// The same whose ranks agree by TCP, as those of several processes do: by it they also learn of their group.
fn nccl_by_tcp(num_ranks: usize, patience: Duration) -> Vec<Rank> {
    agreeing_by(tcp(num_ranks, patience), Some(&emulator())).unwrap()
}

fn emulator() -> PathBuf {
    let libraries = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/cuda-emulator");
    assert!(libraries.join("libnccl.so.2").is_file(), "libnccl.so.2 is missing\nhint: cargo xtask emulator");
    libraries
}

/// A check of all that makes groups, on any machine.
fn everywhere(check: Check) {
    check(&Groups { name: "threads", make: &threads, most: 4 });
    check(&Groups { name: "tcp", make: &tcp, most: 4 });
    check(&Groups { name: "nccl", make: &nccl, most: 4 });
    check(&Groups { name: "nccl by tcp", make: &nccl_by_tcp, most: 4 });
}

/// Runs every rank on a thread of its own; what each returns, in their order.
fn on_threads<T: Send>(ranks: Vec<Rank>, run: impl Fn(Rank) -> T + Sync) -> Vec<T> {
    std::thread::scope(|scope| {
        let run = &run;
        let threads: Vec<_> = ranks.into_iter().map(|rank| scope.spawn(move || run(rank))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

/// Every group from one rank on.
fn every_group(groups: &Groups<'_>, run: impl Fn(Rank, &str) + Sync) {
    for num_ranks in 1..=groups.most {
        let what = format!("{num_ranks} ranks of {}", groups.name);
        let ranks = (groups.make)(num_ranks, LONG);
        for (index, rank) in ranks.iter().enumerate() {
            assert_eq!((rank.rank(), rank.num_ranks()), (index, num_ranks), "{what}");
        }
        on_threads(ranks, |rank| run(rank, &what));
    }
}

/// Numbers of a rank in a round; their sum depends on its order.
fn numbers(rank: usize, round: usize, len: usize) -> Vec<f32> {
    let number = |i: usize| {
        let mixed = (i + 31 * rank + 1009 * round).wrapping_mul(2_654_435_761) % 100_003;
        (mixed as f32 - 50_000.0) * 10f32.powi((mixed % 9) as i32 - 4)
    };
    (0..len).map(number).collect()
}

fn array(rows: usize, cols: usize, values: &[f32]) -> Array {
    let mut array = Array::new();
    array.reshape(rows, cols);
    array.values_mut().copy_from_slice(values);
    array
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

/// `[rows, cols]`: nothing, one number, odd ones, more than a rank sums for itself, more than a socket's buffer.
const SHAPES: [[usize; 2]; 7] = [[0, 8], [1, 1], [3, 5], [1, 512], [64, 512], [33, 1037], [257, 4096]];

/// The sum of all ranks' numbers, in the order of ranks.
fn summed(num_ranks: usize, round: usize, len: usize) -> Vec<f32> {
    let mut sum = numbers(0, round, len);
    for other in 1..num_ranks {
        sum.iter_mut().zip(numbers(other, round, len)).for_each(|(sum, term)| *sum += term);
    }
    sum
}

fn sums(groups: &Groups<'_>) {
    every_group(groups, |mut rank, what| {
        for (round, [rows, cols]) in SHAPES.into_iter().cycle().take(3 * SHAPES.len()).enumerate() {
            let len = rows * cols;
            let expected = summed(rank.num_ranks(), round, len);
            let mut x = array(rows, cols, &numbers(rank.rank(), round, len));
            rank.all_reduce(&mut x).unwrap();
            assert_eq!((x.rows(), x.cols()), (rows, cols), "{what}");
            assert!(bits(x.values()) == bits(&expected), "{what}, [{rows}, {cols}]");
        }
    });
}

#[test]
fn sums_are_added_in_the_order_of_ranks_at_every_call() {
    everywhere(sums);
}

/// As [`SHAPES`], with more rows than GPUs sum at once.
const TALL: [[usize; 2]; 8] =
    [[0, 8], [1, 1], [33, 1037], [383, 3], [511, 3], [512, 100], [1030, 37], [600, 512]];

fn pieces(groups: &Groups<'_>) {
    every_group(groups, |mut rank, what| {
        for (round, [rows, cols]) in TALL.into_iter().cycle().take(3 * TALL.len()).enumerate() {
            let len = rows * cols;
            let mut x = array(rows, cols, &numbers(rank.rank(), round, len));
            let pieces = rank.pieces(rows);
            let end = pieces.iter().try_fold(0, |end, piece| (piece.start == end).then_some(piece.end));
            assert_eq!(end, Some(rows), "{what}: {pieces:?}");
            for piece in pieces {
                rank.begin_all_reduce(&x, piece).unwrap();
            }
            rank.finish_all_reduce(&mut x).unwrap();
            let expected = summed(rank.num_ranks(), round, len);
            assert_eq!((x.rows(), x.cols()), (rows, cols), "{what}");
            assert!(bits(x.values()) == bits(&expected), "{what}, [{rows}, {cols}]");
            // What comes next follows them.
            rank.broadcast(0, &mut x).unwrap();
            assert!(bits(x.values()) == bits(&expected), "{what}, [{rows}, {cols}] handed round");
        }
    });
}

#[test]
fn sums_that_are_begun_in_pieces_are_the_same() {
    everywhere(pieces);
}

fn parts(groups: &Groups<'_>) {
    every_group(groups, |mut rank, what| {
        let mut out = Array::new();
        for round in 0..12 {
            let len = 3 + 40 * round;
            // Some parts are empty.
            let size = |rank: usize| (rank * 3 + round) % 5;
            let all: usize = (0..rank.num_ranks()).map(size).sum();
            let own = size(rank.rank());
            let part = array(own, len, &numbers(rank.rank(), round, own * len));
            rank.all_gather(Axis::Rows, &part, &mut out).unwrap();
            let rows: Vec<f32> =
                (0..rank.num_ranks()).flat_map(|rank| numbers(rank, round, size(rank) * len)).collect();
            assert_eq!((out.rows(), out.cols()), (all, len), "{what}");
            assert!(bits(out.values()) == bits(&rows), "{what}, rows of round {round}");

            let mut first = Array::new();
            rank.gather(Axis::Rows, &part, &mut first).unwrap();
            let is_right =
                if rank.rank() == 0 { bits(first.values()) == bits(&rows) } else { first.rows() == 0 };
            assert!(is_right, "{what}, only the first has the rows of round {round}");

            let part = array(len, own, &numbers(rank.rank(), round, own * len));
            rank.all_gather(Axis::Columns, &part, &mut out).unwrap();
            assert_eq!((out.rows(), out.cols()), (len, all), "{what}");
            for row in 0..len {
                let expected: Vec<f32> = (0..rank.num_ranks())
                    .flat_map(|rank| {
                        numbers(rank, round, size(rank) * len)[row * size(rank)..][..size(rank)].to_vec()
                    })
                    .collect();
                assert!(bits(out.row(row)) == bits(&expected), "{what}, columns of round {round}");
            }
        }
    });
}

#[test]
fn parts_of_unlike_sizes_lie_side_by_side_in_the_order_of_ranks() {
    everywhere(parts);
}

fn roots(groups: &Groups<'_>) {
    every_group(groups, |mut rank, what| {
        for (round, [rows, cols]) in SHAPES.into_iter().cycle().take(2 * SHAPES.len()).enumerate() {
            let root = round % rank.num_ranks();
            let mut x = match rank.rank() == root {
                true => array(rows, cols, &numbers(root, round, rows * cols)),
                false => array(2, 3, &[f32::NAN; 6]),
            };
            rank.broadcast(root, &mut x).unwrap();
            assert_eq!((x.rows(), x.cols()), (rows, cols), "{what}");
            assert!(bits(x.values()) == bits(&numbers(root, round, rows * cols)), "{what}");
        }
    });
}

#[test]
fn everyone_has_what_the_root_had() {
    everywhere(roots);
}

/// Calls until the group has ended; the error, and how long the last call took.
fn until_the_end(mut rank: Rank) -> (String, Duration) {
    let mut x = array(4, 100, &[1.0; 400]);
    loop {
        let begun = Instant::now();
        if let Err(error) = rank.all_reduce(&mut x) {
            let took = begun.elapsed();
            assert!(rank.all_reduce(&mut x).is_err(), "an ended group stays so");
            return (error.to_string(), took);
        }
    }
}

fn deaths(groups: &Groups<'_>) {
    let Groups { name, make, most } = groups;
    for num_ranks in 2..=*most {
        for dying in 0..num_ranks {
            let ends = on_threads(make(num_ranks, LONG), |mut rank| -> Option<(String, Duration)> {
                if rank.rank() != dying {
                    return Some(until_the_end(rank));
                }
                let mut x = array(4, 100, &[1.0; 400]);
                (0..5).for_each(|_| rank.all_reduce(&mut x).unwrap());
                None
            });
            for (error, took) in ends.into_iter().flatten() {
                assert!(error.contains("is gone"), "{name}: {error}");
                assert!(took < LONG / 2, "{name}: it took {took:?}");
            }
        }
    }
}

#[test]
fn a_rank_that_dies_ends_the_calls_of_all_others_at_once() {
    everywhere(deaths);
}

fn hangs(groups: &Groups<'_>) {
    let Groups { name, make, most } = groups;
    for num_ranks in 2..=3.min(*most) {
        // Longer than it takes all to meet, which GPUs begin with contexts of their own.
        let begun = Instant::now();
        drop(make(num_ranks, LONG));
        let patience = (2 * begun.elapsed()).max(Duration::from_millis(200));
        for hanging in 0..num_ranks {
            let done = std::sync::Barrier::new(num_ranks);
            on_threads(make(num_ranks, patience), |mut rank| {
                if rank.rank() == hanging {
                    done.wait(); // It holds its place until the others have given up.
                    let late = rank.all_reduce(&mut array(4, 100, &[1.0; 400]));
                    assert!(late.is_err(), "{name}: who comes late finds nobody");
                } else {
                    let (error, _) = until_the_end(rank);
                    assert!(error.contains("did not come") || error.contains("is gone"), "{name}: {error}");
                    done.wait();
                }
            });
        }
    }
}

#[test]
fn a_rank_that_hangs_ends_the_calls_of_all_others_when_their_patience_does() {
    everywhere(hangs);
}

fn disagreements(groups: &Groups<'_>) {
    let calls: [fn(&mut Rank) -> Result<()>; 3] = [
        |rank| rank.all_reduce(&mut array(2, 2 + rank.rank() % 2, &vec![0.0; 4 + 2 * (rank.rank() % 2)])),
        |rank| match rank.rank() {
            0 => rank.broadcast(0, &mut array(1, 1, &[0.0])),
            _ => rank.all_reduce(&mut array(1, 1, &[0.0])),
        },
        |rank| {
            let rows = 600 + rank.rank() % 2;
            let mut x = array(rows, 1, &vec![0.0; rows]);
            rank.pieces(rows).into_iter().try_for_each(|piece| rank.begin_all_reduce(&x, piece))?;
            rank.finish_all_reduce(&mut x)
        },
    ];
    let Groups { name, make, most } = groups;
    for (index, call) in calls.iter().enumerate().filter(|_| *most > 1) {
        let ends = on_threads(make(3.min(*most), LONG), |mut rank| {
            let first = call(&mut rank);
            first.and_then(|()| rank.all_reduce(&mut array(1, 1, &[0.0]))).err()
        });
        assert!(ends.iter().all(Option::is_some), "{name}, call {index}: {ends:?}");
    }
}

#[test]
fn ranks_that_disagree_are_told_so_on_every_rank() {
    everywhere(disagreements);
}

/// Whatever the others are at, some of it in pieces, all hear of it, and the group goes on with what comes next.
fn ranks_without_room(groups: &Groups<'_>) {
    let rows = 2 * 512;
    every_group(groups, |mut rank, what| {
        let (own, num_ranks) = (rank.rank(), rank.num_ranks());
        let sum: f32 = (1..=num_ranks).map(|rank| rank as f32).sum();
        for has_none in 0..num_ranks {
            let mut x = array(rows, 4, &vec![1.0 + own as f32; rows * 4]);
            let pieces = rank.pieces(rows);
            rank.begin_all_reduce(&x, pieces[0].clone()).unwrap();
            let told = match own == has_none {
                true => rank.end_step(false),
                false => (pieces[1..].iter().cloned())
                    .try_for_each(|piece| rank.begin_all_reduce(&x, piece))
                    .and_then(|()| rank.finish_all_reduce(&mut x)),
            };
            let is_told = matches!(told, Err(Error::NoRoomOnRank { rank }) if rank == has_none);
            assert!(is_told, "{what}: rank {own} of {has_none}: {told:?}");
            // Of the half step that follows nothing is left over, and all have room for it.
            let mut half = array(8, 4, &[1.0 + own as f32; 32]);
            rank.begin_all_reduce(&half, 0..8).unwrap();
            rank.finish_all_reduce(&mut half).unwrap();
            assert_eq!(half.values(), [sum; 32], "{what}");
            rank.end_step(true).unwrap();
            // Behind all that a step has to tell.
            let told = rank.end_step(own != has_none);
            assert!(
                matches!(told, Err(Error::NoRoomOnRank { rank }) if rank == has_none),
                "{what}: {told:?}"
            );
        }
    });
}

#[test]
fn gpus_hear_of_a_rank_without_room_and_go_on() {
    ranks_without_room(&Groups { name: "nccl", make: &nccl, most: 3 });
    ranks_without_room(&Groups { name: "nccl by tcp", make: &nccl_by_tcp, most: 2 });
}

#[test]
fn a_rank_that_belongs_to_another_group_is_sent_away() {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let leader = listener.local_addr().unwrap();
    let patience = Duration::from_millis(300);
    let stranger = std::thread::spawn(move || TcpRank::join(leader, 1, 2, 5, patience));
    let error = TcpRank::lead(&listener, 2, 6, patience, || None).unwrap_err();
    assert_eq!(error.to_string(), "hello on rank 0: rank 1 did not come within 300ms");
    drop(stranger.join().unwrap());
}

/// Of a GPU that is there, one rank: before version 2.30 NCCL has no two on the same one.
#[test]
#[ignore = "needs a CUDA device"]
fn a_single_gpu_is_a_group() {
    check_single(None);
}

#[test]
fn a_single_emulated_gpu_is_a_group() {
    check_single(Some(emulator()));
}

fn check_single(libraries: Option<PathBuf>) {
    let control = threads(1, LONG).remove(0);
    let mut rank = OnGpu::new(libraries, control).unwrap();
    for (round, [rows, cols]) in SHAPES.into_iter().enumerate() {
        let expected = numbers(0, round, rows * cols);
        let mut x = array(rows, cols, &expected);
        let mut out = Array::new();
        rank.all_reduce(&mut x).unwrap();
        rank.broadcast(0, &mut x).unwrap();
        for axis in [Axis::Rows, Axis::Columns] {
            rank.all_gather(axis, &x, &mut out).unwrap();
            assert!(bits(out.values()) == bits(&expected), "[{rows}, {cols}] along {axis:?}");
        }
    }
}
