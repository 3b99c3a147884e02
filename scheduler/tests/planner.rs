//! The planner against all layouts there are, and against lists whose answer is plain.
#![forbid(unsafe_code)]

use scheduler::{
    Case, Extra, KvTokens, Piece, PlannedStage, Problem, RankCosts, StageDevice, best_layout, faster_layout,
    in_flight,
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

    fn seconds(&mut self, bound: u64) -> f64 {
        self.below(bound) as f64 * 0.1
    }
}

/// A whole question for the planner.
#[derive(Debug)]
struct Question {
    cases: Vec<Case>,
    ends_block: Vec<bool>,
    widths: Option<Vec<usize>>,
    kv: KvTokens,
}

impl Question {
    fn draw(draws: &mut Draws) -> Self {
        let ends_block = blocks(draws);
        let num_kinds = 1 + draws.index(2);
        let kinds = runs_of_kinds(draws, num_kinds);
        let memory: Vec<u64> = (0..num_kinds).map(|_| 4 + draws.below(60)).collect();
        let per_row = 1 + draws.below(3);
        let num_cases = 1 + draws.below(3);
        let cases = (1..=num_cases)
            .map(|rows| {
                let hop = draws.seconds(4);
                let devices = kinds.iter().map(|&kind| StageDevice {
                    kind,
                    memory_bytes: memory[kind],
                    hop_seconds: hop,
                    cut_hop_seconds: hop + kind as f64 * 0.2,
                });
                let costs = (0..num_kinds).map(|_| widths_of(draws, ends_block.len())).collect();
                Case { rows, decode_rows: rows as f64, devices: devices.collect(), costs }
            })
            .collect();
        let wanted = KvTokens::Wanted { tokens: per_row * (2 + draws.below(20)), per_row };
        let kv =
            if draws.below(3) == 0 { wanted } else { KvTokens::PerRow { tokens: per_row, rows: u64::MAX } };
        let widths =
            (draws.below(6) == 0).then(|| (0..1 + draws.index(3)).map(|_| 1 + draws.index(2)).collect());
        Question { cases, ends_block, widths, kv }
    }

    fn problem(&self, case: usize) -> Problem<'_> {
        let case = &self.cases[case];
        case.problem(&self.ends_block).with_widths(self.widths.as_deref())
    }

    /// The most rows per second of any layout, tried one by one.
    fn most_rows_per_second(&self) -> f64 {
        let tried = (0..self.cases.len()).map(|case| {
            let mut trial = Trial {
                problem: self.problem(case),
                rows: self.cases[case].rows,
                kv: self.kv,
                stages: vec![],
                best: 0.0,
            };
            trial.from(0, 0);
            trial.best
        });
        tried.fold(0.0, f64::max)
    }
}

/// One to four blocks of one to three pieces each.
fn blocks(draws: &mut Draws) -> Vec<bool> {
    let mut ends = vec![];
    for _ in 0..1 + draws.index(4) {
        ends.extend(vec![false; draws.index(3)]);
        ends.push(true);
    }
    ends.truncate(6);
    *ends.last_mut().unwrap() = true;
    ends
}

/// One to four devices, like beside like as often as not.
fn runs_of_kinds(draws: &mut Draws, num_kinds: usize) -> Vec<usize> {
    let mut kind = draws.index(num_kinds);
    let mut kinds = vec![];
    for _ in 0..1 + draws.index(4) {
        kind = if draws.below(3) == 0 { draws.index(num_kinds) } else { kind };
        kinds.push(kind);
    }
    kinds
}

/// Costs for the widths 1, 2 and 4, or for some of them.
fn widths_of(draws: &mut Draws, num_pieces: usize) -> Vec<(usize, RankCosts)> {
    let pieces: Vec<Piece> = (0..num_pieces)
        .map(|_| Piece {
            seconds: draws.seconds(12),
            weight_bytes: draws.below(9),
            kv_bytes_per_token: draws.below(3).saturating_sub(1),
        })
        .collect();
    let (first, last) = (draws.below(6), draws.below(6));
    let (all_reduce, entry) = (draws.seconds(4), draws.seconds(3));
    let cuts: Vec<f64> = (0..num_pieces).map(|_| draws.seconds(3)).collect();
    let most = draws.index(3);
    let is_tied = draws.below(2) == 0;
    [1, 2, 4][..=most]
        .iter()
        .map(|&width| {
            let share = |bytes: u64| bytes.div_ceil(width as u64);
            let extra = |n: u64| Extra { seconds: n as f64 * 0.1 / width as f64, bytes: share(n) };
            let ranks = pieces.iter().map(|piece| Piece {
                seconds: piece.seconds / width as f64 + if width > 1 { all_reduce } else { 0.0 },
                weight_bytes: share(piece.weight_bytes),
                kv_bytes_per_token: share(piece.kv_bytes_per_token),
            });
            // Tied embeddings, as often as not.
            let shared = if is_tied { extra(first).bytes.min(extra(last).bytes) } else { 0 };
            let costs = RankCosts::new(ranks, extra(first), extra(last)).with_shared(shared);
            let others = (width - 1) as f64;
            let cuts = cuts.iter().map(|cut| cut * others);
            (width, costs.with_cuts(cuts).with_entry(entry * others))
        })
        .collect()
}

/// Tries every run of pieces on every run of devices, one stage after the other.
struct Trial<'a> {
    problem: Problem<'a>,
    rows: u64,
    kv: KvTokens,
    stages: Vec<PlannedStage>,
    best: f64,
}

impl Trial<'_> {
    fn from(&mut self, piece: usize, device: usize) {
        if piece == self.problem.num_pieces() {
            return self.judge();
        }
        if device == self.problem.devices.len() {
            return;
        }
        self.from(piece, device + 1);
        let kind = self.problem.devices[device].kind;
        let stage = self.stages.len();
        for (width, _) in &self.problem.costs[kind] {
            let devices = device..device + width;
            let has_costs =
                |other: &StageDevice| self.problem.costs[other.kind].iter().any(|(other, _)| other == width);
            let may_be = |other: &StageDevice| match self.problem.widths {
                Some(widths) => widths.get(stage) == Some(width) && has_costs(other),
                None => other.kind == kind,
            };
            if !self.problem.devices.get(devices.clone()).is_some_and(|devices| devices.iter().all(may_be)) {
                continue;
            }
            for end in piece + 1..=self.problem.num_pieces() {
                self.stages.push(PlannedStage { pieces: piece..end, devices: devices.clone() });
                self.from(end, devices.end);
                self.stages.pop();
            }
        }
    }

    fn judge(&mut self) {
        let Some(kv_tokens) = self.kv.needed(self.rows, self.stages.len() as u64) else { return };
        if self.stages.iter().all(|stage| self.problem.stage_missing_bytes(stage, kv_tokens) == 0) {
            self.best = self.best.max(self.rows as f64 / self.problem.bottleneck(&self.stages));
        }
    }
}

/// Contiguous, over all pieces, on devices in order, and within memory.
fn check(question: &Question, case: usize, stages: &[PlannedStage]) {
    let problem = question.problem(case);
    let ends = stages.last().map(|stage| stage.pieces.end);
    assert_eq!((stages[0].pieces.start, ends), (0, Some(problem.num_pieces())), "{stages:?}");
    for pair in stages.windows(2) {
        assert_eq!(pair[0].pieces.end, pair[1].pieces.start, "{stages:?}");
        assert!(pair[0].devices.end <= pair[1].devices.start, "{stages:?}");
    }
    let kv_tokens = question.kv.needed(question.cases[case].rows, stages.len() as u64).unwrap();
    for stage in stages {
        assert!(!stage.pieces.is_empty() && stage.devices.end <= problem.devices.len(), "{stages:?}");
        assert_eq!(problem.stage_missing_bytes(stage, kv_tokens), 0, "{stages:?} in {question:?}");
    }
}

#[test]
fn no_layout_of_10_000_small_cases_is_faster_than_the_planner_s() {
    let mut draws = Draws(1);
    let (mut fitting, mut cut, mut parallel, mut idle) = (0, 0, 0, 0);
    for _ in 0..10_000 {
        let question = Question::draw(&mut draws);
        let least = question.most_rows_per_second();
        let choice =
            best_layout(&question.cases, &question.ends_block, question.widths.as_deref(), question.kv);
        let Some(choice) = choice else {
            assert_eq!(least, 0.0, "{question:?}");
            continue;
        };
        check(&question, choice.case, &choice.stages);
        let ours = question.cases[choice.case].rows as f64 / choice.bottleneck;
        let is_equal = ours == least || (ours - least).abs() <= 1e-9 * least;
        assert!(is_equal, "{ours} rows/s, the best has {least}: {choice:?} in {question:?}");
        fitting += 1;
        let is_cut = |stage: &PlannedStage| !question.ends_block[stage.pieces.end - 1];
        cut += usize::from(choice.stages.iter().any(is_cut));
        parallel += usize::from(choice.stages.iter().any(|stage| stage.devices.len() > 1));
        let used: usize = choice.stages.iter().map(|stage| stage.devices.len()).sum();
        idle += usize::from(used < question.cases[choice.case].devices.len());
    }
    // The cases are worth something only while all of these are among the answers.
    assert!(
        fitting > 5_000 && cut > 500 && parallel > 500 && idle > 500,
        "{fitting} {cut} {parallel} {idle}"
    );
}

/// What a search of several numbers of replicas asks for.
#[test]
fn only_a_layout_that_is_faster_is_found() {
    let mut draws = Draws(2);
    let mut found = 0;
    for _ in 0..2_000 {
        let question = Question::draw(&mut draws);
        let most = question.most_rows_per_second();
        let faster_than = |rows_per_second: f64| {
            let Question { cases, ends_block, widths, kv } = &question;
            faster_layout(cases, ends_block, widths.as_deref(), *kv, rows_per_second)
        };
        // Free layouts take no time at all and are faster than any.
        if most.is_infinite() {
            assert_eq!(faster_than(1e300).map(|choice| choice.bottleneck), Some(0.0), "{question:?}");
            continue;
        }
        assert_eq!(faster_than(most * (1.0 + 1e-6)), None, "{question:?}");
        if most > 0.0 {
            let choice = faster_than(most * (1.0 - 1e-6)).unwrap_or_else(|| panic!("{question:?}"));
            let ours = question.cases[choice.case].rows as f64 / choice.bottleneck;
            assert!((ours - most).abs() <= 1e-9 * most, "{ours} {most}: {question:?}");
            found += 1;
        }
    }
    assert!(found > 1_000, "{found}");
}

/// Equal devices without limits, one width, no hops.
fn plain(seconds: &[f64], num_devices: usize, memory_bytes: u64) -> Question {
    let pieces = seconds.iter().map(|&seconds| Piece { seconds, weight_bytes: 1, kv_bytes_per_token: 0 });
    let costs = vec![vec![(1, RankCosts::new(pieces, Extra::default(), Extra::default()))]];
    let device = StageDevice { kind: 0, memory_bytes, hop_seconds: 0.0, cut_hop_seconds: 0.0 };
    let cases = vec![Case { rows: 1, decode_rows: 1.0, devices: vec![device; num_devices], costs }];
    Question {
        cases,
        ends_block: vec![true; seconds.len()],
        widths: None,
        kv: KvTokens::PerRow { tokens: 1, rows: u64::MAX },
    }
}

impl Question {
    fn ends(&self) -> Option<Vec<usize>> {
        let choice = best_layout(&self.cases, &self.ends_block, self.widths.as_deref(), self.kv)?;
        Some(choice.stages.iter().map(|stage| stage.pieces.end).collect())
    }
}

#[test]
fn equal_blocks_are_laid_out_evenly() {
    assert_eq!(plain(&[0.1; 30], 2, 100).ends().unwrap(), [15, 30]);
    assert_eq!(plain(&[5.0, 3.0, 3.0, 5.0], 2, 100).ends().unwrap(), [2, 4]);
}

#[test]
fn a_stage_that_makes_nothing_faster_is_left_out() {
    assert_eq!(plain(&[9.0, 1.0, 1.0, 1.0, 1.0], 3, 100).ends().unwrap(), [1, 5]);
}

#[test]
fn devices_without_a_block_stay_idle() {
    assert_eq!(plain(&[1.0; 2], 5, 100).ends().unwrap(), [1, 2]);
    assert_eq!(plain(&[1.0; 3], 1, 100).ends().unwrap(), [3]);
}

#[test]
fn memory_decides_where_time_would_not() {
    assert_eq!(plain(&[4.0, 1.0, 1.0, 1.0], 2, 2).ends().unwrap(), [2, 4]);
    assert_eq!(plain(&[4.0, 1.0, 1.0, 1.0], 2, 1).ends(), None);
    assert_eq!(plain(&[1.0], 4, 0).ends(), None);
}

#[test]
fn a_pipeline_keeps_one_micro_batch_more_than_stages_in_flight() {
    assert_eq!((in_flight(1), in_flight(2), in_flight(8)), (1, 3, 9));
}

/// Attention before and after blocks without: only the stages with keys and values are bound by them.
#[test]
fn a_stage_without_attention_needs_no_room_for_keys_and_values() {
    let mut question = plain(&[1.0; 6], 3, 22);
    let piece = |kv_bytes_per_token| Piece { seconds: 1.0, weight_bytes: 1, kv_bytes_per_token };
    let pieces = [1, 1, 0, 0, 0, 0].map(piece);
    question.cases[0].costs = vec![vec![(1, RankCosts::new(pieces, Extra::default(), Extra::default()))]];
    question.kv = KvTokens::Wanted { tokens: 10, per_row: 2 };
    let choice = best_layout(&question.cases, &question.ends_block, None, question.kv).unwrap();
    check(&question, choice.case, &choice.stages);
    assert_eq!(question.ends().unwrap(), [2, 4, 6]);
    // Half the room: both blocks with attention part, and the others take what they leave.
    question.cases[0].devices.iter_mut().for_each(|device| device.memory_bytes = 12);
    assert_eq!(question.ends().unwrap(), [1, 3, 6]);
}

#[test]
fn a_block_larger_than_any_device_fits_nowhere_unless_it_is_cut() {
    let mut question = plain(&[1.0, 1.0, 1.0], 8, 5);
    let piece = |weight_bytes| Piece { seconds: 1.0, weight_bytes, kv_bytes_per_token: 0 };
    let costs = |bytes: &[u64]| {
        let pieces: Vec<Piece> = bytes.iter().map(|bytes| piece(*bytes)).collect();
        vec![vec![(1, RankCosts::new(pieces, Extra::default(), Extra::default()))]]
    };
    question.cases[0].costs = costs(&[1, 6, 1]);
    assert_eq!(question.ends(), None);
    (question.cases[0].costs, question.ends_block) = (costs(&[1, 3, 3, 1]), vec![true, false, true, true]);
    assert_eq!(question.ends().unwrap().last(), Some(&4));
}
