//! The way from GPU to GPU between processes, both ends of it in one here: what comes over, and that nobody is held for ever.
//! Between two processes it is tested by whole jobs. And ranks of a stage, of which nobody is held either.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kernels::{
    Array, Axis, Backend, Collective, Cuda, CudaArray, CudaOptions, Gate, GroupExit, KvDtype, NcclRank,
    NcclReceiver, NcclSender, Parcel, Result, ThreadRank, WeightType, thread_ranks,
};

fn emulator() -> PathBuf {
    let libraries = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/cuda-emulator");
    assert!(libraries.join("libnccl.so.2").is_file(), "libnccl.so.2 is missing\nhint: cargo xtask emulator");
    libraries
}

fn cuda() -> Cuda {
    Cuda::new(CudaOptions {
        device: 0,
        weights: WeightType::Bf16,
        kv: KvDtype::Bf16,
        is_deterministic: true,
        has_graphs: false,
        ffn_columns: Cuda::FFN_COLUMNS,
        libraries: Some(emulator()),
        cubins: None,
    })
    .unwrap()
}

fn gate(cuda: &Cuda) -> Gate {
    let gate = cuda.gate().expect("a GPU has one");
    assert!(gate.has_nccl());
    gate
}

/// Both ends of a group.
fn joined(from: &Cuda, to: &Cuda) -> ((NcclSender, GroupExit), (NcclReceiver, GroupExit)) {
    let id = gate(from).new_group().unwrap();
    let (sends, receives) = (GroupExit::default(), GroupExit::default());
    let sender = std::thread::scope(|scope| {
        let sender = scope.spawn(|| gate(from).sender(&sends, id).unwrap());
        (gate(to).receiver(&receives, id).unwrap(), sender.join().unwrap())
    });
    ((sender.1, sends), (sender.0, receives))
}

fn array(cuda: &Cuda, rows: usize, cols: usize, values: &[f32]) -> CudaArray {
    let mut array = cuda.array();
    cuda.upload(values, rows, cols, &mut array).unwrap();
    array
}

fn numbers(seed: usize, len: usize) -> Vec<f32> {
    (0..len).map(|i| ((i * 7919 + seed * 104_729) % 10_007) as f32 - 5e3).collect()
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

/// What is taken over of a parcel.
fn taken(cuda: &Cuda, parcel: &Parcel) -> Vec<f32> {
    let (mut out, mut values) = (cuda.array(), Vec::new());
    cuda.take_over(parcel, &mut out).unwrap();
    cuda.download(&out, &mut values).unwrap();
    values
}

/// The sender goes on with its arrays at once, and the receiver's memory is used again and again.
#[test]
fn parcels_come_over_bit_for_bit_and_in_order_alone_and_by_twos() {
    let (from, to) = (cuda(), cuda());
    let ((mut sender, _), (mut receiver, _)) = joined(&from, &to);
    let shapes = [[1, 8], [33, 64], [0, 8], [257, 129], [2, 3]];
    for (round, [rows, cols]) in shapes.into_iter().cycle().take(4 * shapes.len()).enumerate() {
        let count = 1 + round % 2;
        let sent: Vec<Vec<f32>> = (0..count).map(|k| numbers(2 * round + k, rows * cols)).collect();
        let parcels: Vec<Parcel> = (sent.iter())
            .map(|values| {
                let mut x = array(&from, rows, cols, values);
                let parcel = from.hand_over(&x).unwrap().unwrap();
                from.upload(&vec![f32::NAN; rows * cols], rows, cols, &mut x).unwrap();
                parcel
            })
            .collect();
        let received = match round % 3 {
            // Whichever is first.
            0 => {
                let received = receiver.receive(count, rows, cols).unwrap();
                sender.send(&parcels.iter().collect::<Vec<_>>()).unwrap();
                received
            }
            _ => {
                sender.send(&parcels.iter().collect::<Vec<_>>()).unwrap();
                receiver.receive(count, rows, cols).unwrap()
            }
        };
        drop(parcels);
        for (parcel, values) in received.iter().zip(&sent) {
            assert_eq!(parcel.shape(), (rows, cols));
            assert!(bits(&taken(&to, parcel)) == bits(values), "round {round}, [{rows}, {cols}]");
        }
    }
}

/// For what must not end by itself.
const A_WHILE: Duration = Duration::from_millis(300);
/// For what must, on a machine that has much else to do.
const LONG: Duration = Duration::from_secs(30);

/// Runs something on a thread of its own; whether it has ended by itself within a time, and the thread.
fn ends(within: Duration, run: impl FnOnce() + Send + 'static) -> (bool, std::thread::JoinHandle<()>) {
    let thread = std::thread::spawn(run);
    let begun = Instant::now();
    while !thread.is_finished() && begun.elapsed() < within {
        std::thread::sleep(Duration::from_millis(5));
    }
    (thread.is_finished(), thread)
}

#[test]
fn who_waits_for_one_that_is_gone_waits_until_the_group_is_left_and_meets_the_next_one_in_another() {
    let (from, to) = (Arc::new(cuda()), Arc::new(cuda()));
    let ((sender, _), (mut receiver, exit)) = joined(&from, &to);
    let mut parcels = receiver.receive(1, 4, 8).unwrap();
    drop(sender);
    let (parcel, device) = (parcels.remove(0), Arc::clone(&to));
    let (has_ended, waiting) = ends(A_WHILE, move || drop(taken(&device, &parcel)));
    assert!(!has_ended, "it went on with numbers that nobody has sent");
    exit.leave();
    waiting.join().unwrap();
    assert!(exit.has_left() && receiver.receive(1, 4, 8).is_err());

    let ((mut sender, _), (mut receiver, _)) = joined(&from, &to);
    let values = numbers(1, 32);
    sender.send(&[&from.hand_over(&array(&from, 4, 8, &values)).unwrap().unwrap()]).unwrap();
    assert_eq!(bits(&taken(&to, &receiver.receive(1, 4, 8).unwrap()[0])), bits(&values));
}

/// A sender's memory is used again only when what it held was received, or never will be.
#[test]
fn what_nobody_receives_holds_its_sender_until_that_leaves() {
    let (from, to) = (Arc::new(cuda()), cuda());
    let ((mut sender, exit), (receiver, _)) = joined(&from, &to);
    let parcel = from.hand_over(&array(&from, 4, 8, &numbers(1, 32))).unwrap().unwrap();
    sender.send(&[&parcel]).unwrap();
    drop(parcel);
    drop(receiver);
    exit.leave();
    assert!(sender.send(&[]).is_err());
    let (has_ended, thread) = ends(LONG, move || {
        let parcel = from.hand_over(&array(&from, 4, 8, &numbers(2, 32))).unwrap().unwrap();
        assert_eq!(bits(&parcel.values().unwrap()), bits(&numbers(2, 32)));
    });
    assert!(has_ended, "its memory is held by whom nobody hears");
    thread.join().unwrap();
}

#[test]
fn who_waits_for_another_to_join_can_be_called_off() {
    let cuda = cuda();
    let (gate, exit) = (gate(&cuda), GroupExit::default());
    let id = gate.new_group().unwrap();
    let (own_gate, own_exit) = (gate.clone(), exit.clone());
    let (has_ended, waiting) = ends(A_WHILE, move || assert!(own_gate.receiver(&own_exit, id).is_err()));
    assert!(!has_ended, "it joined a group of nobody else");
    exit.leave();
    waiting.join().unwrap();
    // And who was called off before never begins.
    assert!(gate.sender(&exit, id).is_err());
}

#[test]
fn what_ranks_have_told_each_other_is_given_back_and_made_again() {
    let cuda = cuda();
    let alone = Box::new(thread_ranks(1, LONG).remove(0));
    let mut rank = NcclRank::join(&cuda, alone, &GroupExit::default()).unwrap();
    let free_bytes = cuda.free_bytes().unwrap();
    for _ in 0..2 {
        rank.reserve(1 << 20).unwrap();
        assert!(cuda.free_bytes().unwrap() + (4 << 20) <= free_bytes, "there is room for so many numbers");
        rank.free();
        assert_eq!(cuda.free_bytes().unwrap(), free_bytes);
    }
    let mut x = array(&cuda, 1, 8, &[1.0; 8]);
    rank.all_reduce(&mut x).unwrap();
}

/// Has its rank tell the others what comes and then fall silent, as one that dies or hangs before it has queued anything.
struct Silent {
    rank: ThreadRank,
    /// Whether it tells them of something else.
    disagrees: bool,
}

impl Collective<Array> for Silent {
    fn rank(&self) -> usize {
        self.rank.rank()
    }

    fn num_ranks(&self) -> usize {
        self.rank.num_ranks()
    }

    fn all_reduce(&mut self, x: &mut Array) -> Result<()> {
        self.rank.all_reduce(x)
    }

    fn all_gather(&mut self, axis: Axis, part: &Array, out: &mut Array) -> Result<()> {
        let mut told = Array::new();
        told.reshape(part.rows(), part.cols());
        told.values_mut().copy_from_slice(part.values());
        told.values_mut()[0] += f32::from(u8::from(self.disagrees));
        self.rank.all_gather(axis, &told, out)?;
        std::thread::sleep(2 * LONG);
        Ok(())
    }

    fn gather(&mut self, axis: Axis, part: &Array, out: &mut Array) -> Result<()> {
        self.rank.gather(axis, part, out)
    }

    fn broadcast(&mut self, root: usize, x: &mut Array) -> Result<()> {
        self.rank.broadcast(root, x)
    }
}

#[test]
fn a_rank_whose_device_waits_for_another_is_woken_by_its_way_out_and_has_no_further_call() {
    let (device, exit) = (cuda(), GroupExit::default());
    let mut ranks = thread_ranks(2, 2 * LONG).into_iter();
    let first = Box::new(ranks.next().unwrap());
    let second = Box::new(Silent { rank: ranks.next().unwrap(), disagrees: false });
    std::thread::spawn(move || {
        let cuda = cuda();
        let mut rank = NcclRank::join(&cuda, second, &GroupExit::default()).unwrap();
        let _ = rank.all_reduce(&mut array(&cuda, 1, 8, &[1.0; 8]));
    });
    let mut rank = NcclRank::join(&device, first, &exit).unwrap();
    let mut x = array(&device, 1, 8, &[1.0; 8]);
    rank.all_reduce(&mut x).unwrap();
    let (has_ended, waiting) = ends(A_WHILE, move || {
        // Numbers come of it that are none, and so nothing else may.
        device.download(&x, &mut Vec::new()).unwrap();
        let told = rank.all_reduce(&mut x).unwrap_err().to_string();
        assert_eq!(told, "all_reduce on rank 0: the group was left");
    });
    assert!(!has_ended, "it went on with numbers that nobody has sent");
    exit.leave();
    waiting.join().unwrap();
}

/// Where NCCL waits for the other ranks before it frees what it has.
#[test]
fn who_leaves_a_group_does_not_wait_for_those_who_are_in_it() {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "leaving", "--ignored"]).env("EMULATED_NCCL_ABORT", "waits");
    let output = command.output().unwrap();
    let [told, errors] = [&output.stdout, &output.stderr].map(|told| String::from_utf8_lossy(told));
    assert!(output.status.success() && told.contains("1 passed"), "{told}{errors}");
}

#[test]
#[ignore = "a part of who_leaves_a_group_does_not_wait_for_those_who_are_in_it"]
fn leaving() {
    let (device, exit, others_exit) = (cuda(), GroupExit::default(), GroupExit::default());
    let mut ranks = thread_ranks(2, LONG).into_iter();
    let first = Box::new(ranks.next().unwrap());
    let second = Box::new(Silent { rank: ranks.next().unwrap(), disagrees: true });
    let other = others_exit.clone();
    std::thread::spawn(move || {
        let cuda = cuda();
        let mut rank = NcclRank::join(&cuda, second, &other).unwrap();
        let _ = rank.all_reduce(&mut array(&cuda, 1, 8, &[1.0; 8]));
    });
    let mut rank = NcclRank::join(&device, first, &exit).unwrap();
    let (has_ended, failing) = ends(LONG, move || {
        let told = rank.all_reduce(&mut array(&device, 1, 8, &[1.0; 8])).unwrap_err().to_string();
        assert_eq!(told, "all_reduce on rank 0: rank 1 is at another operation");
    });
    assert!(has_ended, "it waits for one that is in the group");
    failing.join().unwrap();
    assert!(exit.has_left() && !exit.has_freed_within(A_WHILE), "freed what another one may use");
    others_exit.leave();
    assert!(exit.has_freed_within(LONG) && others_exit.has_freed_within(LONG));
}
