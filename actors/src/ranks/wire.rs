//! What the first rank of a stage and a process that follows it say to each other. Both are this program: nothing here
//! outlives a run.

use std::net::SocketAddr;
use std::time::Duration;

use serde_json::{Value, json};
use stages::{AttentionSlice, CollectiveTimes, Device, RankStep};

use super::watch::Done;
use super::{RanksArgs, SpanOrder};
use crate::wire::{self, ReadWords, Voice, Words};

/// What a process is to be.
#[derive(Debug, Clone)]
pub(super) struct Order {
    pub(super) span: SpanOrder,
    pub(super) rank: usize,
    pub(super) num_ranks: usize,
    pub(super) leader: SocketAddr,
    pub(super) device: Device,
}

/// What a process says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Word {
    /// It is there, and loads.
    Beat,
    /// It has its part of the model, and follows.
    Ready,
    /// It has taken a step.
    Done(Done),
    /// It ends, and why.
    End { message: String, is_consequence: bool },
}

impl Order {
    pub(super) fn of(args: &RanksArgs, rank: usize, leader: SocketAddr, group: u64) -> Self {
        Order {
            span: SpanOrder::of(args, group),
            rank,
            num_ranks: args.devices.len(),
            leader,
            device: args.devices[rank].clone(),
        }
    }

    pub(super) fn encode(&self) -> Vec<u8> {
        let order = json!({
            "span": self.span.json(), "rank": self.rank, "num_ranks": self.num_ranks,
            "leader": self.leader.to_string(), "device": wire::device(&self.device),
        });
        order.to_string().into_bytes()
    }

    pub(super) fn decode(bytes: &[u8]) -> Option<Self> {
        let order: Value = serde_json::from_slice(bytes).ok()?;
        let size = |key: &str| usize::try_from(order[key].as_u64()?).ok();
        Some(Order {
            span: SpanOrder::read(&order["span"])?,
            rank: size("rank")?,
            num_ranks: size("num_ranks")?,
            leader: order["leader"].as_str()?.parse().ok()?,
            device: wire::read_device(&order["device"])?,
        })
    }
}

impl Word {
    pub(super) fn say(&self, voice: &Voice) {
        voice.say(0, &self.encode());
    }

    pub(super) fn encode(&self) -> Vec<u8> {
        let word = match self {
            Word::Beat => json!({"beat": true}),
            Word::Ready => json!({"ready": true}),
            Word::Done(done) => json!({"done": numbers(done)}),
            Word::End { message, is_consequence } => {
                json!({"end": message, "is_consequence": is_consequence})
            }
        };
        word.to_string().into_bytes()
    }

    pub(super) fn decode(bytes: &[u8]) -> Option<Self> {
        let word: Value = serde_json::from_slice(bytes).ok()?;
        if let Some(numbers) = word["done"].as_array() {
            let numbers: Vec<u64> = numbers.iter().map(Value::as_u64).collect::<Option<_>>()?;
            return done(&numbers).map(Word::Done);
        }
        let is = |key: &str| word[key].as_bool() == Some(true);
        match word["end"].as_str() {
            None if is("beat") => Some(Word::Beat),
            None => is("ready").then_some(Word::Ready),
            Some(message) => Some(Word::End {
                message: message.to_owned(),
                is_consequence: word["is_consequence"].as_bool()?,
            }),
        }
    }
}

/// A step that was taken as numbers.
fn numbers(done: &Done) -> [u64; 7] {
    let Done { micro_batch, tokens, decode_tokens, time, collectives } = done;
    let CollectiveTimes { calls, bytes, time: in_collectives } = collectives;
    let nanos = |time: &Duration| time.as_nanos() as u64;
    [*micro_batch, *tokens as u64, *decode_tokens as u64, nanos(time), *calls, *bytes, nanos(in_collectives)]
}

/// The step of such numbers, where they are that.
fn done(numbers: &[u64]) -> Option<Done> {
    let [micro_batch, tokens, decode_tokens, time, calls, bytes, in_collectives] = *numbers else {
        return None;
    };
    Some(Done {
        micro_batch,
        tokens: usize::try_from(tokens).ok()?,
        decode_tokens: usize::try_from(decode_tokens).ok()?,
        time: Duration::from_nanos(time),
        collectives: CollectiveTimes { calls, bytes, time: Duration::from_nanos(in_collectives) },
    })
}

/// A step that was taken, among words.
pub(crate) fn add_done(words: &mut Words, done: &Done) {
    numbers(done).into_iter().for_each(|number| words.add(number));
}

/// Reads such a step.
pub(crate) fn read_done(words: &mut ReadWords<'_>) -> Option<Done> {
    let numbers: Vec<u64> = (0..7).map(|_| words.word()).collect::<Option<_>>()?;
    done(&numbers)
}

/// A step as words.
pub(super) fn encode_step(step: &RankStep) -> Vec<u8> {
    let RankStep { micro_batch, slices, logit_rows, greedy_rows } = step;
    let mut words = Words::default();
    words.add(*micro_batch);
    words.add(slices.len() as u64);
    for AttentionSlice { first_row, num_rows, first_position, pages } in slices {
        [*first_row, *num_rows, *first_position].into_iter().for_each(|size| words.add(size as u64));
        words.add_list(pages);
    }
    words.add_list(logit_rows);
    words.add_list(greedy_rows);
    words.into_bytes()
}

/// The step of such words, where they are that.
pub(super) fn decode_step(bytes: &[u8]) -> Option<RankStep> {
    let mut words = ReadWords::new(bytes);
    let slice = |words: &mut ReadWords<'_>| {
        let (first_row, num_rows, first_position) = (words.size()?, words.size()?, words.size()?);
        Some(AttentionSlice { first_row, num_rows, first_position, pages: words.list(ReadWords::u32)? })
    };
    let step = RankStep {
        micro_batch: words.word()?,
        slices: words.list(slice)?,
        logit_rows: words.list(ReadWords::u32)?,
        greedy_rows: words.list(ReadWords::u32)?,
    };
    words.rest().is_empty().then_some(step)
}

#[cfg(test)]
pub(crate) mod tests {
    use stages::Simd;

    use super::*;
    use crate::ranks::some_order;

    fn order(device: Device, end_column: Option<usize>) -> Order {
        let leader = "127.0.0.1:4711".parse().unwrap();
        Order { span: some_order(end_column), rank: 2, num_ranks: 4, leader, device }
    }

    /// A step whose every number is another.
    pub(crate) fn done() -> Done {
        let collectives = CollectiveTimes { calls: 3, bytes: 1 << 40, time: Duration::from_nanos(5) };
        let time = Duration::from_micros(7);
        Done { micro_batch: u64::MAX, tokens: 9, decode_tokens: 2, time, collectives }
    }

    #[test]
    fn orders_come_back_as_they_were_given() {
        let cpu = Device::Cpu { cores: vec![4, 5], threads: 2, simd: Simd::Portable };
        for order in [order(cpu, None), order(Device::Reference, Some(1280))] {
            let back = Order::decode(&order.encode()).expect("an order");
            assert_eq!(format!("{back:?}"), format!("{order:?}"));
        }
        assert!(Order::decode(b"{}").is_none() && Order::decode(b"no JSON").is_none());
    }

    #[test]
    fn words_come_back_as_they_were_said() {
        let end = Word::End { message: "it \"panicked\"".to_owned(), is_consequence: true };
        for word in [Word::Beat, Word::Ready, Word::Done(done()), end] {
            assert_eq!(Word::decode(&word.encode()), Some(word));
        }
        assert_eq!(Word::decode(b"{\"ready\": false}"), None);
        assert_eq!(Word::decode(b"{\"done\": [1, 2, 3]}"), None);
    }

    #[test]
    fn steps_come_back_as_they_were_told_and_nothing_else_passes_for_one() {
        let slice = |first_row, pages: &[u32]| AttentionSlice {
            first_row,
            num_rows: 2,
            first_position: 70,
            pages: pages.to_vec(),
        };
        let step = RankStep {
            micro_batch: 77,
            slices: vec![slice(0, &[5, u32::MAX]), slice(2, &[])],
            logit_rows: vec![1],
            greedy_rows: vec![],
        };
        let bytes = encode_step(&step);
        assert_eq!(format!("{:?}", decode_step(&bytes).expect("a step")), format!("{step:?}"));
        for length in 0..bytes.len() {
            assert!(decode_step(&bytes[..length]).is_none(), "{length} bytes");
        }
        assert!(decode_step(&[bytes, vec![0; 8]].concat()).is_none());
    }
}
