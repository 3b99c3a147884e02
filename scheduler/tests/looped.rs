//! Layouts that go through the devices twice against all of their kind there are.
#![forbid(unsafe_code)]

use scheduler::{
    Case, Extra, KvTokens, Piece, Problem, RankCosts, StageDevice, best_layout, faster_looped, in_flight,
    least_bottleneck_on_seats,
};

/// A sequence of numbers that is the same each time.
struct Draws(u64);

impl Draws {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % bound
    }

    fn index(&mut self, bound: usize) -> usize {
        self.below(bound as u64) as usize
    }

    fn extra(&mut self) -> Extra {
        Extra { seconds: self.below(5) as f64 * 0.1, bytes: self.below(5) }
    }
}

/// What whole blocks cost on one kind of device.
#[derive(Debug, Clone)]
struct Kind {
    blocks: Vec<Piece>,
    first: Extra,
    last: Extra,
    shared_bytes: u64,
    memory_bytes: u64,
}

impl Kind {
    fn draw(draws: &mut Draws, num_blocks: usize) -> Self {
        let piece = |draws: &mut Draws| Piece {
            seconds: draws.below(12) as f64 * 0.1,
            weight_bytes: draws.below(7),
            kv_bytes_per_token: draws.below(4).saturating_sub(1),
        };
        let blocks = (0..num_blocks).map(|_| piece(draws)).collect();
        let (first, last) = (draws.extra(), draws.extra());
        // Tied embeddings, as often as not.
        let shared_bytes = first.bytes.min(last.bytes) * draws.below(2);
        Kind { blocks, first, last, shared_bytes, memory_bytes: 10 + draws.below(140) }
    }

    /// The planner's costs, each block in so many pieces as `pieces` says.
    fn costs(&self, pieces: &[usize]) -> RankCosts {
        let of_block = |(block, &count): (&Piece, &usize)| {
            let rest = Piece { seconds: 0.0, weight_bytes: 0, kv_bytes_per_token: 0 };
            let mut all = vec![rest; count];
            all[0] = Piece { seconds: block.seconds / 2.0, ..*block };
            all[count - 1].seconds += block.seconds / 2.0;
            all
        };
        let pieces = self.blocks.iter().zip(pieces).flat_map(of_block);
        RankCosts::new(pieces, self.first, self.last).with_shared(self.shared_bytes)
    }
}

/// A whole question.
#[derive(Debug)]
struct Question {
    rows: Vec<u64>,
    /// For each micro-batch size the kinds, and the time of a hop.
    kinds: Vec<(Vec<Kind>, f64)>,
    kind_of_each: Vec<usize>,
    /// Pieces of each block.
    pieces: Vec<usize>,
    kv: KvTokens,
}

impl Question {
    fn draw(draws: &mut Draws) -> Self {
        let num_blocks = 3 + draws.index(5);
        let num_kinds = 1 + draws.index(2);
        let rows: Vec<u64> = (1..=1 + draws.below(3)).collect();
        let base: Vec<Kind> = (0..num_kinds).map(|_| Kind::draw(draws, num_blocks)).collect();
        let at = |rows: u64, draws: &mut Draws| {
            // What a micro-batch takes grows by less than its rows.
            let factor = 1.0 + 0.1 * (rows - 1) as f64 * draws.below(8) as f64;
            let mut kinds = base.clone();
            kinds.iter_mut().flat_map(|kind| &mut kind.blocks).for_each(|block| block.seconds *= factor);
            (kinds, draws.below(3) as f64 * 0.05)
        };
        let per_row = 1 + draws.below(3);
        let wanted = KvTokens::Wanted { tokens: per_row * (3 + draws.below(20)), per_row };
        Question {
            kinds: rows.iter().map(|rows| at(*rows, draws)).collect(),
            rows,
            kind_of_each: (0..2 + draws.index(2)).map(|_| draws.index(num_kinds)).collect(),
            pieces: (0..num_blocks).map(|_| 1 + draws.index(2)).collect(),
            kv: if draws.below(3) == 0 {
                wanted
            } else {
                KvTokens::PerRow { tokens: per_row, rows: u64::MAX }
            },
        }
    }

    fn cases(&self) -> Vec<Case> {
        let case = |(rows, (kinds, hop)): (&u64, &(Vec<Kind>, f64))| Case {
            rows: *rows,
            decode_rows: *rows as f64,
            devices: (self.kind_of_each.iter())
                .map(|&kind| StageDevice {
                    kind,
                    memory_bytes: kinds[kind].memory_bytes,
                    hop_seconds: hop * (1 + kind) as f64,
                    cut_hop_seconds: 100.0,
                })
                .collect(),
            costs: kinds.iter().map(|kind| vec![(1, kind.costs(&self.pieces))]).collect(),
        };
        self.rows.iter().zip(&self.kinds).map(case).collect()
    }

    fn ends_block(&self) -> Vec<bool> {
        self.pieces.iter().flat_map(|&count| (1..=count).map(move |piece| piece == count)).collect()
    }

    /// The most rows per second, over every border between the parts and every cut of both.
    fn most_rows_per_second(&self) -> f64 {
        let num_blocks = self.pieces.len();
        let mut best: f64 = 0.0;
        for border in 1..num_blocks {
            let fronts = all_cuts(0, border, self.kind_of_each.len());
            let backs = all_cuts(border, num_blocks, self.kind_of_each.len());
            for (front, back) in fronts.iter().flat_map(|front| backs.iter().map(move |back| (front, back))) {
                for case in 0..self.rows.len() {
                    best = best.max(self.rows_per_second(case, front, back).unwrap_or(0.0));
                }
            }
        }
        best
    }

    /// Of a layout whose devices end their slices at these blocks, if it fits.
    fn rows_per_second(&self, case: usize, front: &[usize], back: &[usize]) -> Option<f64> {
        let num_blocks = self.pieces.len();
        let (kinds, hop) = &self.kinds[case];
        let starts = |ends: &[usize], first: usize| [&[first], &ends[..ends.len() - 1]].concat();
        let (front_starts, back_starts) = (starts(front, 0), starts(back, front[front.len() - 1]));
        let is_slice = |(start, end): (&usize, &usize)| usize::from(end > start);
        let num_stages: usize = front_starts.iter().zip(front).map(is_slice).sum::<usize>()
            + back_starts.iter().zip(back).map(is_slice).sum::<usize>();
        let kv_tokens = self.kv.needed(self.rows[case], num_stages as u64)?;
        let mut slowest: f64 = 0.0;
        for (device, &of_kind) in self.kind_of_each.iter().enumerate() {
            let kind = &kinds[of_kind];
            let slices = [front_starts[device]..front[device], back_starts[device]..back[device]];
            let (mut seconds, mut bytes, mut ends) = (0.0, 0, 0);
            for slice in slices.into_iter().filter(|slice| !slice.is_empty()) {
                let blocks = &kind.blocks[slice.clone()];
                seconds += blocks.iter().map(|block| block.seconds).sum::<f64>();
                bytes +=
                    blocks.iter().map(|b| b.weight_bytes + b.kv_bytes_per_token * kv_tokens).sum::<u64>();
                let at_ends = [(slice.start == 0, kind.first), (slice.end == num_blocks, kind.last)];
                for (_, extra) in at_ends.into_iter().filter(|(is_there, _)| *is_there) {
                    (seconds, bytes, ends) = (seconds + extra.seconds, bytes + extra.bytes, ends + 1);
                }
                seconds += if slice.end < num_blocks { hop * (1 + of_kind) as f64 } else { 0.0 };
            }
            bytes -= if ends == 2 { kind.shared_bytes } else { 0 };
            if bytes > kind.memory_bytes {
                return None;
            }
            slowest = slowest.max(seconds);
        }
        Some(self.rows[case] as f64 / slowest)
    }
}

/// Every way to end so many runs, empty ones too, that begin at `start` and go to `end`.
fn all_cuts(start: usize, end: usize, count: usize) -> Vec<Vec<usize>> {
    if count == 1 {
        return vec![vec![end]];
    }
    let with = |first: usize| {
        all_cuts(first, end, count - 1).into_iter().map(move |rest| [vec![first], rest].concat())
    };
    (start..=end).flat_map(with).collect()
}

#[test]
fn no_layout_that_passes_devices_twice_is_faster_in_4_000_small_cases() {
    let mut draws = Draws(1);
    let (mut fitting, mut twice, mut faster, mut refused) = (0, 0, 0, 0);
    for _ in 0..4_000 {
        let question = Question::draw(&mut draws);
        let most = question.most_rows_per_second();
        let (cases, ends) = (question.cases(), question.ends_block());
        let looped = |rows_per_second| faster_looped(&cases, &ends, question.kv, rows_per_second);
        let Some(choice) = looped(0.0) else {
            assert_eq!(most, 0.0, "{question:?}");
            refused += 1;
            continue;
        };
        let case = &cases[choice.case];
        let problem = Problem::new(&case.devices, &ends, &case.costs);
        let ours = case.rows as f64 / problem.bottleneck(&choice.stages);
        assert!(ours == most || (ours - most).abs() <= 1e-9 * most, "{ours} {most} {choice:?} {question:?}");
        assert_eq!(choice.bottleneck, problem.bottleneck(&choice.stages));
        let kv_tokens = question.kv.needed(case.rows, choice.stages.len() as u64).unwrap();
        assert_eq!(problem.missing_bytes(&choice.stages, kv_tokens), 0, "{choice:?} {question:?}");
        let bounds: Vec<usize> = choice.stages.iter().map(|stage| stage.pieces.start).collect();
        let next: Vec<usize> = choice.stages.iter().map(|stage| stage.pieces.end).collect();
        assert_eq!((bounds[0], &bounds[1..], next.last()), (0, &next[..next.len() - 1], Some(&ends.len())));
        assert!(next.iter().all(|end| ends[end - 1]), "{choice:?} {question:?}");
        if most.is_finite() {
            assert_eq!(looped(most * (1.0 + 1e-6)), None, "{question:?}");
            assert!(looped(most * (1.0 - 1e-6)).is_some(), "{question:?}");
        }
        let is_twice =
            |device| choice.stages.iter().filter(|stage| stage.devices.start == device).count() == 2;
        let once = best_layout(&cases, &ends, None, question.kv);
        let once = once.map_or(0.0, |once| cases[once.case].rows as f64 / once.bottleneck);
        fitting += 1;
        twice += usize::from((0..case.devices.len()).any(is_twice));
        faster += usize::from(ours > once * 1.01);
    }
    // The cases are worth something only while all of these are among the answers.
    assert!(
        fitting > 2_000 && twice > 1_000 && faster > 200 && refused > 100,
        "{fitting} {twice} {faster} {refused}"
    );
}

/// What `stages = "auto"` does for a job that names its devices as such a layout passes them.
#[test]
fn stages_cut_for_devices_as_a_plan_passes_them_twice_are_as_fast_as_the_plan_s() {
    let mut draws = Draws(7);
    let mut twice = 0;
    for _ in 0..1_000 {
        // A job's memory is one, and its cuts are of whole blocks.
        let mut question = Question::draw(&mut draws);
        question.pieces.fill(1);
        for kind in question.kinds.iter_mut().flat_map(|(kinds, _)| kinds) {
            kind.memory_bytes = u64::MAX;
        }
        let (cases, ends) = (question.cases(), question.ends_block());
        let choice = faster_looped(&cases, &ends, question.kv, 0.0).expect("memory is no limit");
        let case = &cases[choice.case];
        let problem = Problem::new(&case.devices, &ends, &case.costs);
        let seats: Vec<usize> = choice.stages.iter().map(|stage| stage.devices.start).collect();
        twice += usize::from((0..seats.len()).any(|at| seats[..at].contains(&seats[at])));
        let stages = least_bottleneck_on_seats(&problem, &seats).unwrap();
        let on: Vec<usize> = stages.iter().map(|stage| stage.devices.start).collect();
        assert_eq!(on, seats);
        let slowest = problem.bottleneck(&stages);
        assert!(slowest <= choice.bottleneck * (1.0 + 1e-6), "{slowest}: {choice:?} {question:?}");
    }
    assert!(twice > 300, "{twice} of 1,000 pass a device twice");
}

/// Heavy blocks at the front and light ones at the back: each device takes one of both.
#[test]
fn devices_share_a_front_part_and_a_back_part() {
    let blocks = [8.0, 7.0, 3.0, 4.0].map(|seconds| Piece { seconds, ..Piece::default() });
    let costs = vec![vec![(1, RankCosts::new(blocks, Extra::default(), Extra::default()))]];
    let device = StageDevice { kind: 0, memory_bytes: 0, hop_seconds: 0.0, cut_hop_seconds: 0.0 };
    let cases = [Case { rows: 1, decode_rows: 1.0, devices: vec![device; 2], costs }];
    let looped = |rows_per_second| {
        faster_looped(&cases, &[true; 4], KvTokens::PerRow { tokens: 1, rows: u64::MAX }, rows_per_second)
    };
    let choice = looped(0.0).unwrap();
    let stages: Vec<_> = choice.stages.iter().map(|s| (s.pieces.clone(), s.devices.start)).collect();
    assert_eq!((choice.bottleneck, stages), (11.0, vec![(0..1, 0), (1..2, 1), (2..3, 0), (3..4, 1)]));
    assert_eq!(in_flight(choice.stages.len() as u64), 5);
    assert_eq!(
        best_layout(&cases, &[true; 4], None, KvTokens::PerRow { tokens: 1, rows: u64::MAX })
            .unwrap()
            .bottleneck,
        14.0
    );
    assert_eq!(looped(1.0 / 11.0), None);
}
