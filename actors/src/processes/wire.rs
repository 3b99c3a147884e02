//! What a keeper and its stage's process say to each other.

use std::time::Duration;

use scheduler::{Failure, Load, MicroBatchId, MicroBatchOutput, SequenceId, SliceOutput, TokenLogprobs};
use serde_json::{Value, json};
use stages::{CollectiveTimes, Device};

use super::ProcessArgs;
use crate::clock::StepWork;
use crate::error::Error;
use crate::ranks::{Done, RankHome, SpanOrder, add_done, read_done};
use crate::stage::StageEnd;
use crate::wire::{self, ReadWords, Words};

/// What a process is to be.
#[derive(Debug, Clone)]
pub(super) struct Order {
    pub(super) span: SpanOrder,
    pub(super) num_stages: usize,
    pub(super) devices: Vec<Device>,
    pub(super) ranks_are_processes: bool,
    /// Whether somebody wants to know of each step of its ranks.
    pub(super) tells_rank_steps: bool,
    /// The first micro-batch that is not lost.
    pub(super) lost_before: u64,
}

impl Order {
    pub(super) fn of(args: &ProcessArgs, group: u64, lost_before: MicroBatchId) -> Self {
        let ranks = &args.ranks;
        Order {
            span: SpanOrder::of(ranks, group),
            num_stages: args.num_stages,
            devices: ranks.devices.clone(),
            ranks_are_processes: ranks.home == RankHome::Processes,
            tells_rank_steps: ranks.watch.has_listener(),
            lost_before: lost_before.0,
        }
    }

    pub(super) fn encode(&self) -> Vec<u8> {
        let devices: Vec<Value> = self.devices.iter().map(wire::device).collect();
        let order = json!({
            "span": self.span.json(), "num_stages": self.num_stages, "devices": devices,
            "ranks_are_processes": self.ranks_are_processes, "tells_rank_steps": self.tells_rank_steps,
            "lost_before": self.lost_before,
        });
        order.to_string().into_bytes()
    }

    pub(super) fn decode(bytes: &[u8]) -> Option<Self> {
        let order: Value = serde_json::from_slice(bytes).ok()?;
        Some(Order {
            span: SpanOrder::read(&order["span"])?,
            num_stages: usize::try_from(order["num_stages"].as_u64()?).ok()?,
            devices: order["devices"].as_array()?.iter().map(wire::read_device).collect::<Option<_>>()?,
            ranks_are_processes: order["ranks_are_processes"].as_bool()?,
            tells_rank_steps: order["tells_rank_steps"].as_bool()?,
            lost_before: order["lost_before"].as_u64()?,
        })
    }
}

/// What a process is told after its order, by the kind of a frame.
pub(super) const FLUSH: u32 = 1;
pub(super) const JOIN: u32 = 2;
/// No more than what each of them says: which micro-batches are lost.
pub(super) const LOST: u32 = 3;

/// What a process says.
#[derive(Debug, Clone)]
pub(super) enum Word {
    /// It has its span, and takes micro-batches on this port.
    Ready {
        port: u16,
    },
    /// It is there, whatever it is at.
    Beat,
    Begins(MicroBatchId),
    /// It has computed a micro-batch, and each of its ranks has spent so much on collectives since it last said so.
    HandsOn(StepWork, Vec<CollectiveTimes>),
    ComputesInVain,
    Rests,
    /// A micro-batch has arrived at the next stage.
    Hop {
        bytes: u64,
        time: Duration,
    },
    Flushed,
    Tokens(MicroBatchOutput),
    End(End),
    /// One of its ranks has taken a step.
    RankStep(usize, Done),
}

/// Why a process ends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct End {
    pub(super) message: String,
    /// Whether it is a bug of ours.
    pub(super) is_panic: bool,
    pub(super) micro_batch: Option<u64>,
}

impl End {
    pub(super) fn of(end: &StageEnd) -> Self {
        let micro_batch = end.micro_batch.map(|id| id.0);
        let (message, is_panic) = match &end.error {
            Error::Panic { message, .. } => (message.clone(), true),
            Error::Step { message, .. } | Error::Load { message, .. } => (message.clone(), false),
            other => (other.to_string(), false),
        };
        End { message, is_panic, micro_batch }
    }

    /// What it means of a stage that was there, or was being loaded.
    pub(super) fn error(&self, stage: usize, is_loaded: bool) -> Error {
        let message = self.message.clone();
        match (self.is_panic, is_loaded) {
            (true, _) => Error::Panic { stage, message },
            (false, true) => Error::Step { stage, message },
            (false, false) => Error::Load { stage, message },
        }
    }
}

impl Word {
    /// Its kind, which a frame has, and its body.
    pub(super) fn encode(&self) -> (u32, Vec<u8>) {
        let mut words = Words::default();
        let kind = match self {
            Word::Ready { port } => {
                words.add(u64::from(*port));
                1
            }
            Word::Beat => 2,
            Word::Begins(id) => {
                words.add(id.0);
                3
            }
            Word::HandsOn(work, collectives) => {
                add_work(&mut words, work);
                words.add(collectives.len() as u64);
                for CollectiveTimes { calls, bytes, time } in collectives {
                    [*calls, *bytes, time.as_nanos() as u64].into_iter().for_each(|word| words.add(word));
                }
                4
            }
            Word::ComputesInVain => 5,
            Word::Rests => 6,
            Word::Hop { bytes, time } => {
                words.add(*bytes);
                words.add(time.as_nanos() as u64);
                7
            }
            Word::Flushed => 8,
            Word::Tokens(output) => {
                add_output(&mut words, output);
                9
            }
            Word::End(End { message, is_panic, micro_batch }) => {
                let end = json!({"message": message, "is_panic": is_panic, "micro_batch": micro_batch});
                return (10, end.to_string().into_bytes());
            }
            Word::RankStep(rank, done) => {
                words.add(*rank as u64);
                add_done(&mut words, done);
                11
            }
        };
        (kind, words.into_bytes())
    }

    pub(super) fn decode(kind: u32, body: &[u8]) -> Option<Self> {
        let mut words = ReadWords::new(body);
        let word = match kind {
            1 => Word::Ready { port: u16::try_from(words.word()?).ok()? },
            2 => Word::Beat,
            3 => Word::Begins(MicroBatchId(words.word()?)),
            4 => {
                let work = read_work(&mut words)?;
                let collectives = words.list(|words| {
                    let (calls, bytes) = (words.word()?, words.word()?);
                    let time = Duration::from_nanos(words.word()?);
                    Some(CollectiveTimes { calls, bytes, time })
                })?;
                Word::HandsOn(work, collectives)
            }
            5 => Word::ComputesInVain,
            6 => Word::Rests,
            7 => Word::Hop { bytes: words.word()?, time: Duration::from_nanos(words.word()?) },
            8 => Word::Flushed,
            9 => Word::Tokens(read_output(&mut words)?),
            10 => return read_end(body),
            11 => Word::RankStep(words.size()?, read_done(&mut words)?),
            _ => return None,
        };
        words.rest().is_empty().then_some(word)
    }
}

fn read_end(body: &[u8]) -> Option<Word> {
    let end: Value = serde_json::from_slice(body).ok()?;
    Some(Word::End(End {
        message: end["message"].as_str()?.to_owned(),
        is_panic: end["is_panic"].as_bool()?,
        micro_batch: end["micro_batch"].as_u64(),
    }))
}

fn add_work(words: &mut Words, work: &StepWork) {
    let StepWork { micro_batch, tokens, load, hop_bytes } = work;
    words.add(micro_batch.0);
    words.add(*tokens as u64);
    words.add(*hop_bytes);
    let Load { decode_tokens, decode_context, prefill_tokens, prefill_context, logit_rows } = *load;
    for number in [decode_tokens, decode_context, prefill_tokens, prefill_context, logit_rows] {
        words.add(number.to_bits());
    }
}

fn read_work(words: &mut ReadWords<'_>) -> Option<StepWork> {
    let (micro_batch, tokens, hop_bytes) = (MicroBatchId(words.word()?), words.size()?, words.word()?);
    let mut number = || words.word().map(f64::from_bits);
    let load = Load {
        decode_tokens: number()?,
        decode_context: number()?,
        prefill_tokens: number()?,
        prefill_context: number()?,
        logit_rows: number()?,
    };
    Some(StepWork { micro_batch, tokens, load, hop_bytes })
}

fn add_output(words: &mut Words, output: &MicroBatchOutput) {
    words.add(output.id.0);
    words.add(output.slices.len() as u64);
    for SliceOutput { sequence, token, logprobs, prompt_logprobs, failure } in &output.slices {
        words.add(sequence.0);
        words.add(token.map_or(0, |token| u64::from(token) + 1));
        words.add(u64::from(logprobs.is_some()));
        logprobs.iter().for_each(|logprobs| add_logprobs(words, logprobs));
        words.add(prompt_logprobs.len() as u64);
        prompt_logprobs.iter().for_each(|logprobs| add_logprobs(words, logprobs));
        match failure {
            None => words.add(0),
            Some(Failure::NonFiniteLogits { position }) => {
                words.add(1);
                words.add(u64::from(*position));
            }
            Some(Failure::EndsStage) => words.add(2),
            Some(Failure::NothingLeft { position }) => {
                words.add(3);
                words.add(u64::from(*position));
            }
            Some(Failure::GuideGaveUp { position }) => {
                words.add(4);
                words.add(u64::from(*position));
            }
        }
    }
}

fn read_output(words: &mut ReadWords<'_>) -> Option<MicroBatchOutput> {
    let id = MicroBatchId(words.word()?);
    let slices = words.list(|words| {
        Some(SliceOutput {
            sequence: SequenceId(words.word()?),
            token: match words.word()? {
                0 => None,
                token => Some(u32::try_from(token - 1).ok()?),
            },
            logprobs: if words.flag()? { Some(read_logprobs(words)?) } else { None },
            prompt_logprobs: words.list(read_logprobs)?,
            failure: match words.word()? {
                0 => None,
                1 => Some(Failure::NonFiniteLogits { position: words.u32()? }),
                2 => Some(Failure::EndsStage),
                3 => Some(Failure::NothingLeft { position: words.u32()? }),
                4 => Some(Failure::GuideGaveUp { position: words.u32()? }),
                _ => return None,
            },
        })
    })?;
    Some(MicroBatchOutput { id, slices })
}

fn add_logprobs(words: &mut Words, logprobs: &TokenLogprobs) {
    let TokenLogprobs { token, logprob, top } = logprobs;
    words.add(u64::from(*token));
    words.add_f32(*logprob);
    words.add(top.len() as u64);
    for (token, logprob) in top {
        words.add(u64::from(*token));
        words.add_f32(*logprob);
    }
}

fn read_logprobs(words: &mut ReadWords<'_>) -> Option<TokenLogprobs> {
    let (token, logprob) = (words.u32()?, words.f32()?);
    let top = words.list(|words| Some((words.u32()?, words.f32()?)))?;
    Some(TokenLogprobs { token, logprob, top })
}

#[cfg(test)]
mod tests {
    use stages::Simd;

    use super::*;
    use crate::ranks::{some_done, some_order};

    #[test]
    fn orders_come_back_as_they_were_given() {
        let order = Order {
            span: some_order(Some(1280)),
            num_stages: 5,
            devices: vec![
                Device::Cpu { cores: vec![1], threads: 1, simd: Simd::Portable },
                Device::Reference,
            ],
            ranks_are_processes: true,
            tells_rank_steps: true,
            lost_before: 12,
        };
        let back = Order::decode(&order.encode()).expect("an order");
        assert_eq!(format!("{back:?}"), format!("{order:?}"));
        assert!(Order::decode(b"{}").is_none() && Order::decode(b"no JSON").is_none());
    }

    #[test]
    fn words_come_back_as_they_were_said_and_nothing_else_passes_for_one() {
        let logprobs =
            |token| TokenLogprobs { token, logprob: -0.25, top: vec![(7, -0.5), (u32::MAX, -3.0)] };
        let slice = |token, failure| SliceOutput {
            sequence: SequenceId(u64::MAX),
            token,
            logprobs: token.map(logprobs),
            prompt_logprobs: vec![logprobs(1), logprobs(2)],
            failure,
        };
        let output = MicroBatchOutput {
            id: MicroBatchId(9),
            slices: vec![
                slice(Some(0), None),
                slice(None, Some(Failure::NonFiniteLogits { position: 4 })),
                slice(None, Some(Failure::EndsStage)),
                slice(None, Some(Failure::NothingLeft { position: 7 })),
                slice(None, Some(Failure::GuideGaveUp { position: 8 })),
            ],
        };
        let load = Load { decode_tokens: 3.0, decode_context: 0.1, logit_rows: 2.0, ..Load::default() };
        let work = StepWork { micro_batch: MicroBatchId(4), tokens: 17, load, hop_bytes: 5 };
        let collectives = CollectiveTimes { calls: 1, bytes: 2, time: Duration::from_nanos(3) };
        let end = End { message: "it \"panicked\"".to_owned(), is_panic: true, micro_batch: None };
        for word in [
            Word::Ready { port: 65_535 },
            Word::Beat,
            Word::Begins(MicroBatchId(5)),
            Word::HandsOn(work, vec![collectives, collectives]),
            Word::ComputesInVain,
            Word::Rests,
            Word::Hop { bytes: 70, time: Duration::from_micros(8) },
            Word::Flushed,
            Word::Tokens(output),
            Word::End(end),
            Word::RankStep(3, some_done()),
        ] {
            let (kind, body) = word.encode();
            let back = Word::decode(kind, &body).expect("a word");
            assert_eq!(format!("{back:?}"), format!("{word:?}"));
            for length in 0..body.len() {
                assert!(Word::decode(kind, &body[..length]).is_none(), "{length} bytes of {word:?}");
            }
        }
        assert!(Word::decode(12, &[]).is_none());
    }
}
