//! Choosing tokens on the device: a few words for each row go there, with what is to be edited of it, and a few come back, and no
//! logits.

use super::arrays::CudaArray;
use super::stream::Argument;
use super::stream::Memory;
use super::{Cuda, Workspace, locked, row_grid, u32_of};
use crate::backend::LogitStats;
use crate::check;
use crate::choice::{Choice, Chosen, Edit, Edits};
use crate::error::Result;

const OP: &str = "choose";

/// Threads of a block of logit_stats.cu and of choose.cu.
const THREADS: usize = 512;

/// As choose.cu has a choice, with where its edits begin and end, and its mask.
type Asked = [u32; 11];

/// As choose.cu has an edit, the last word for the logit that was there.
type AskedEdit = [u32; 4];

/// No token, and no mask.
const NONE: u32 = u32::MAX;

/// Likeliest tokens of a row that there is room for before anybody asks: as many as OpenAI's API gives.
const USUAL_TOP: usize = 20;

/// What is on its way there and back.
#[derive(Debug)]
pub(super) struct ChoiceWork {
    asked: Memory,
    edits: Memory,
    masks: Memory,
    pub(super) answers: Memory,
    host_asked: Vec<Asked>,
    host_edits: Vec<AskedEdit>,
    host_answers: Vec<u32>,
}

impl ChoiceWork {
    pub(super) fn new(none: impl Fn() -> Memory) -> ChoiceWork {
        ChoiceWork {
            asked: none(),
            edits: none(),
            masks: none(),
            answers: none(),
            host_asked: Vec::new(),
            host_edits: Vec::new(),
            host_answers: Vec::new(),
        }
    }

    /// Bytes of what goes there and of what comes back, for so many rows.
    pub(super) fn bytes(rows: usize) -> [usize; 2] {
        [rows * size_of::<Asked>(), rows * (2 + 2 * USUAL_TOP) * size_of::<u32>()]
    }

    pub(super) fn reserve(&mut self, rows: usize) -> Result<()> {
        let [asked, answers] = ChoiceWork::bytes(rows);
        self.asked.reserve(OP, asked)?;
        self.answers.reserve(OP, answers)
    }
}

impl Cuda {
    pub(super) fn choose_rows(
        &self,
        logits: &mut CudaArray,
        choices: &[Choice],
        changes: &Edits,
        out: &mut Vec<Chosen>,
    ) -> Result<()> {
        out.clear();
        let width = self.ask_choices(logits, choices, changes, NO_TOKENS)?;
        let mut workspace = locked(&self.workspace);
        let Workspace { stats, host_stats, choices: ChoiceWork { answers, host_answers, .. }, .. } =
            &mut *workspace;
        host_stats.resize(logits.rows, [0; 3]);
        host_answers.resize(logits.rows * width, 0);
        self.stream.download(OP, stats, host_stats)?;
        self.stream.download(OP, answers, host_answers)?;
        let rows = host_stats.iter().zip(host_answers.chunks_exact(width)).zip(choices);
        out.extend(rows.map(|((stats, answer), choice)| chosen(*stats, answer, choice, logits.cols)));
        Ok(())
    }

    /// Queues what chooses a token from each row: its statistics and its answer then lie in the workspace, and its token also at `tokens`, where
    /// that is anywhere. Words of an answer.
    pub(super) fn ask_choices(
        &self,
        logits: &mut CudaArray,
        choices: &[Choice],
        changes: &Edits,
        tokens: Argument,
    ) -> Result<usize> {
        check::logits(logits.cols)?;
        check::choices(choices, changes, logits.rows, logits.cols)?;
        let mut workspace = locked(&self.workspace);
        let Workspace { stats, choices: work, .. } = &mut *workspace;
        let ChoiceWork { asked, edits, masks, answers, host_asked, host_edits, .. } = work;
        host_asked.clear();
        host_asked.extend(choices.iter().enumerate().map(|(row, choice)| words(choice, changes, row)));
        host_edits.clear();
        host_edits.extend(changes.edits.iter().map(edit_words));
        let most = choices.iter().map(|choice| choice.top as usize).max().unwrap_or(0).min(logits.cols);
        let width = 2 + 2 * most;
        stats.reserve(OP, logits.rows * size_of::<[u32; 3]>())?;
        asked.reserve(OP, size_of_val(&host_asked[..]))?;
        // As a row's tokens come one by one its edits do: room for them is made seldom.
        let room = |bytes: usize| if bytes == 0 { 0 } else { bytes.next_power_of_two() };
        edits.reserve(OP, room(size_of_val(&host_edits[..])))?;
        masks.reserve(OP, room(size_of_val(&changes.masks[..])))?;
        answers.reserve(OP, logits.rows * width * size_of::<u32>())?;
        let outbox = &mut locked(&self.tables).outbox;
        outbox.send(&self.stream, OP, bytemuck::cast_slice(host_asked), asked)?;
        outbox.send(&self.stream, OP, bytemuck::cast_slice(host_edits), edits)?;
        outbox.send(&self.stream, OP, bytemuck::cast_slice(&changes.masks), masks)?;
        let (grid, cols) = (row_grid(logits.rows, THREADS), u32_of(logits.cols));
        let arguments = [stats.start(), logits.memory.start(), cols, NO_TOKENS];
        // SAFETY: there is room for the statistics of each row.
        unsafe { self.stream.launch(OP, &self.kernels.logit_stats, grid, &arguments) }?;
        let arguments = [
            answers.start(),
            logits.memory.start(),
            stats.start(),
            asked.start(),
            edits.start(),
            masks.start(),
            cols,
            u32_of(width),
            tokens,
        ];
        // SAFETY: each row has its statistics, its choice of a token of the vocabulary, and room for as many pairs as any
        // asks for; its edits and its mask were sent, and are of the vocabulary; `tokens` has room for a token of each row, or is nowhere.
        unsafe { self.stream.launch(OP, &self.kernels.choose, grid, &arguments) }?;
        Ok(width)
    }
}

/// Tokens are wanted nowhere but among the answers.
pub(super) const NO_TOKENS: Argument = Argument::Pointer(0);

fn words(choice: &Choice, changes: &Edits, row: usize) -> Asked {
    let Choice { given, temperature, top_k, top_p, min_p, uniform, top } = *choice;
    let ends = |row: Option<usize>| row.and_then(|row| changes.rows.get(row)).copied().unwrap_or_default();
    let (begin, end) = (ends(row.checked_sub(1)), ends(Some(row)));
    [
        uniform as u32,
        (uniform >> 32) as u32,
        given.unwrap_or(NONE),
        temperature.to_bits(),
        top_k,
        top_p.to_bits(),
        min_p.to_bits(),
        top,
        begin.edits as u32,
        end.edits as u32,
        if begin.masks < end.masks { begin.masks as u32 } else { NONE },
    ]
}

fn edit_words(edit: &Edit) -> AskedEdit {
    [edit.token, edit.scale.to_bits(), edit.shift.to_bits(), 0]
}

pub(super) fn chosen(
    [argmax, max, log_sum_exp]: [u32; 3],
    answer: &[u32],
    choice: &Choice,
    vocabulary: usize,
) -> Chosen {
    let stats = LogitStats { argmax, max: f32::from_bits(max), log_sum_exp: f32::from_bits(log_sum_exp) };
    // Of a row that is not finite nothing but the statistics was written.
    let count = if stats.max.is_finite() { (choice.top as usize).min(vocabulary) } else { 0 };
    let mut top: Vec<(u32, f32)> =
        answer[2..2 + 2 * count].chunks_exact(2).map(|pair| (pair[0], f32::from_bits(pair[1]))).collect();
    top.sort_unstable_by(|(a, x), (b, y)| {
        y.partial_cmp(x).unwrap_or(std::cmp::Ordering::Equal).then(a.cmp(b))
    });
    let token = Some(answer[0]).filter(|&token| token != NONE);
    Chosen { token, logit: f32::from_bits(answer[1]), stats, top }
}
