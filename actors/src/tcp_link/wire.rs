//! A micro-batch and its activations as a frame, and what two ends that have GPUs say of them when they meet.

use std::mem;
use std::sync::Arc;

use scheduler::{
    MicroBatch, MicroBatchId, Request, RequestKey, Sampling, SequenceId, Slice, TokenCount, TokenMask,
};
use stages::{Activations, Frame, GroupId, RowPool, Rows};

use super::STEP;
use crate::wire::{ReadWords, Words, add_values, values};

/// How many arrays of activations come along.
const NONE: u64 = 0;
const VALUES: u64 = 1;
const VALUES_AND_SUMS: u64 = 2;
/// And how many come by another way.
const MOVED_VALUES: u64 = 3;
const MOVED_VALUES_AND_SUMS: u64 = 4;

/// What comes along of a slice's mask.
const NO_MASK: u64 = 0;
const MASK_FAILED: u64 = 1;
const MASK: u64 = 2;

/// What a micro-batch has beside it.
#[derive(Debug, Clone)]
pub(super) enum Content {
    Nothing,
    /// Activations on the host.
    Here(Activations),
    /// Activations that go from GPU to GPU.
    Moved(Moved),
}

/// How many arrays go from GPU to GPU, the residual stream and sums beside it, and their shape.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Moved {
    pub(super) arrays: usize,
    pub(super) rows: usize,
    pub(super) hidden: usize,
}

impl Content {
    /// Bytes that do not pass with the frame.
    pub(super) fn moved_bytes(&self) -> u64 {
        match self {
            Content::Nothing | Content::Here(_) => 0,
            Content::Moved(Moved { arrays, rows, hidden }) => {
                (arrays * rows * hidden * size_of::<f32>()) as u64
            }
        }
    }

    /// What of it there is, and its shape.
    fn kind(&self, num_tokens: usize) -> (u64, [usize; 2]) {
        match self {
            Content::Nothing => (NONE, [0, 0]),
            Content::Here(Activations { sums: None, hidden, .. }) => (VALUES, [num_tokens, *hidden]),
            Content::Here(Activations { sums: Some(_), hidden, .. }) => {
                (VALUES_AND_SUMS, [num_tokens, *hidden])
            }
            Content::Moved(Moved { arrays: 1, rows, hidden }) => (MOVED_VALUES, [*rows, *hidden]),
            Content::Moved(Moved { rows, hidden, .. }) => (MOVED_VALUES_AND_SUMS, [*rows, *hidden]),
        }
    }
}

/// What a sender says of its GPU: which it is, and the group where it may be met.
pub(super) fn greeting(device: usize, group: &GroupId) -> Vec<u8> {
    let mut words = Words::default();
    words.add(device as u64);
    let mut bytes = words.into_bytes();
    bytes.extend(group);
    bytes
}

/// What such a greeting says; nothing where a sender has no GPU.
pub(super) fn read_greeting(bytes: &[u8]) -> Option<(usize, GroupId)> {
    let mut words = ReadWords::new(bytes);
    let device = words.size()?;
    Some((device, words.rest().try_into().ok()?))
}

/// The frame, whose shape is that of the activations; `body` becomes its body: words, and then the numbers of activations on the
/// host.
pub(super) fn encode(batch: &MicroBatch, content: &Content, body: &mut Vec<u8>) -> Frame {
    let mut words = Words::in_place_of(mem::take(body));
    let (kind, shape) = content.kind(batch.num_tokens());
    words.add(kind);
    words.add(batch.slices.len() as u64);
    batch.slices.iter().for_each(|slice| add_slice(&mut words, slice));
    *body = words.into_bytes();
    if let Content::Here(Activations { values, sums, .. }) = content {
        add_values(body, on_host(values));
        sums.iter().for_each(|sums| add_values(body, on_host(sums)));
    }
    Frame { kind: STEP, sequence: batch.id.0, shape: shape.map(|size| size as u64) }
}

fn on_host(rows: &Rows) -> &[f32] {
    match rows {
        Rows::Host(values) => values,
        Rows::Device(_) => unreachable!("what is sent with its frame has been brought to the host"),
    }
}

/// What such a frame was made of, numbers in memory of `pool`; nothing where it is another.
pub(super) fn decode(frame: &Frame, body: &[u8], pool: &RowPool) -> Option<(MicroBatch, Content)> {
    let mut words = ReadWords::new(body);
    let kind = words.word()?;
    let batch = MicroBatch { id: MicroBatchId(frame.sequence), slices: words.list(read_slice)? };
    let content = content_of(frame, &batch, words.rest(), kind, pool)?;
    Some((batch, content))
}

fn content_of(frame: &Frame, batch: &MicroBatch, bytes: &[u8], kind: u64, pool: &RowPool) -> Option<Content> {
    let [rows, hidden] = [usize::try_from(frame.shape[0]).ok()?, usize::try_from(frame.shape[1]).ok()?];
    let array_bytes = rows.checked_mul(hidden)?.checked_mul(size_of::<f32>())?;
    let (arrays_here, content) = match kind {
        NONE => (0, Content::Nothing),
        VALUES | VALUES_AND_SUMS => {
            let (first, second) = bytes.split_at_checked(array_bytes)?;
            let read = |bytes: &[u8]| {
                let mut rows = pool.rows();
                rows.extend(values(bytes));
                Rows::Host(rows)
            };
            let sums = (kind == VALUES_AND_SUMS).then(|| read(second));
            (kind as usize, Content::Here(Activations { values: read(first), sums, hidden }))
        }
        MOVED_VALUES | MOVED_VALUES_AND_SUMS if rows == batch.num_tokens() => {
            let arrays = (kind - MOVED_VALUES + VALUES) as usize;
            (0, Content::Moved(Moved { arrays, rows, hidden }))
        }
        _ => return None,
    };
    (array_bytes.checked_mul(arrays_here)? == bytes.len()).then_some(content)
}

fn add_slice(words: &mut Words, slice: &Slice) {
    let Slice {
        sequence,
        first_position,
        tokens,
        fed_back,
        pages,
        sample,
        bars_stops,
        score,
        counts,
        mask,
        request,
    } = slice;
    assert!(fed_back.is_none(), "{sequence:?}: tokens that are fed back do not leave their stage");
    words.add(sequence.0);
    words.add(u64::from(*first_position));
    words.add_list(tokens);
    words.add_list(pages);
    words.add(u64::from(*sample));
    words.add(u64::from(*bars_stops));
    words.add_list(score);
    words.add(u64::from(counts.is_some()));
    if let Some(counts) = counts {
        words.add(counts.len() as u64);
        for TokenCount { token, generated, in_prompt } in &**counts {
            words.add(u64::from(*token));
            words.add(u64::from(*generated) << 1 | u64::from(*in_prompt));
        }
    }
    // Here, on the thread that sends, a mask is waited for that is not made yet.
    match mask.as_ref().map(TokenMask::wait) {
        None => words.add(NO_MASK),
        Some(None) => words.add(MASK_FAILED),
        Some(Some(bits)) => {
            words.add(MASK);
            words.add_list(bits);
        }
    }
    add_request(words, request);
}

fn read_slice(words: &mut ReadWords<'_>) -> Option<Slice> {
    Some(Slice {
        sequence: SequenceId(words.word()?),
        first_position: words.u32()?,
        tokens: words.list(ReadWords::u32)?.into(),
        fed_back: None,
        pages: Arc::new(words.list(ReadWords::u32)?),
        sample: words.flag()?,
        bars_stops: words.flag()?,
        score: words.list(ReadWords::u32)?,
        counts: if words.flag()? { Some(Arc::new(words.list(read_count)?)) } else { None },
        mask: match words.word()? {
            NO_MASK => None,
            MASK_FAILED => Some(TokenMask::known(None)),
            MASK => Some(TokenMask::known(Some(words.list(ReadWords::u32)?))),
            _ => return None,
        },
        request: Arc::new(read_request(words)?),
    })
}

fn read_count(words: &mut ReadWords<'_>) -> Option<TokenCount> {
    let (token, counted) = (words.u32()?, words.word()?);
    Some(TokenCount { token, generated: u32::try_from(counted >> 1).ok()?, in_prompt: counted & 1 == 1 })
}

/// A request as stages need it: without its prompt, which slices bring, and without stop strings and guide, which the pipeline minds.
fn add_request(words: &mut Words, request: &Request) {
    let Request { key, prompt: _, sampling, sample } = request;
    words.add((key.0 >> 64) as u64);
    words.add(key.0 as u64);
    words.add(u64::from(*sample));
    let Sampling {
        temperature,
        top_p,
        top_k,
        min_p,
        repetition_penalty,
        frequency_penalty,
        presence_penalty,
        logit_bias,
        guide: _,
        seed,
        max_tokens,
        min_tokens,
        stop_token_ids,
        stop: _,
        logprobs,
        prompt_logprobs,
    } = &**sampling;
    let numbers = [temperature, top_p, min_p, repetition_penalty, frequency_penalty, presence_penalty];
    numbers.into_iter().for_each(|number| words.add_f32(*number));
    words.add(logit_bias.len() as u64);
    for (token, bias) in logit_bias {
        words.add(u64::from(*token));
        words.add_f32(*bias);
    }
    [top_k, max_tokens, min_tokens].into_iter().for_each(|number| words.add(u64::from(*number)));
    words.add(*seed);
    words.add_list(stop_token_ids);
    words.add(logprobs.map_or(0, |count| u64::from(count) + 1));
    words.add(u64::from(*prompt_logprobs));
}

fn read_request(words: &mut ReadWords<'_>) -> Option<Request> {
    let key = RequestKey(u128::from(words.word()?) << 64 | u128::from(words.word()?));
    let sample = words.u32()?;
    let [temperature, top_p, min_p] = [words.f32()?, words.f32()?, words.f32()?];
    let [repetition_penalty, frequency_penalty, presence_penalty] =
        [words.f32()?, words.f32()?, words.f32()?];
    let logit_bias = words.list(|words| Some((words.u32()?, words.f32()?)))?;
    let [top_k, max_tokens, min_tokens] = [words.u32()?, words.u32()?, words.u32()?];
    let sampling = Sampling {
        temperature,
        top_p,
        top_k,
        min_p,
        repetition_penalty,
        frequency_penalty,
        presence_penalty,
        logit_bias,
        guide: None,
        seed: words.word()?,
        max_tokens,
        min_tokens,
        stop_token_ids: words.list(ReadWords::u32)?,
        stop: Vec::new(),
        logprobs: match words.word()? {
            0 => None,
            count => Some(u32::try_from(count - 1).ok()?),
        },
        prompt_logprobs: words.flag()?,
    };
    Some(Request { key, prompt: Vec::new(), sampling: Arc::new(sampling), sample })
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A micro-batch of two slices that has everything; what says nothing to a stage is as it comes over.
    pub(crate) fn batch(id: u64) -> MicroBatch {
        let sampling = Sampling {
            temperature: 0.7,
            top_p: 0.9,
            top_k: 40,
            min_p: 0.05,
            repetition_penalty: 1.2,
            frequency_penalty: -0.5,
            presence_penalty: 2.0,
            logit_bias: vec![(4, -100.0), (9, 0.25)],
            guide: None,
            seed: u64::MAX - id,
            max_tokens: 100,
            min_tokens: 3,
            stop_token_ids: vec![2, u32::MAX],
            stop: vec![],
            logprobs: Some(0),
            prompt_logprobs: true,
        };
        let request = Request {
            key: RequestKey(u128::MAX - 5),
            prompt: Vec::new(),
            sampling: sampling.into(),
            sample: 3,
        };
        let count = |token, generated, in_prompt| TokenCount { token, generated, in_prompt };
        let counts = [count(5, 0, true), count(8, u32::MAX, false)];
        let slice = |sequence, tokens: &[u32], score: &[u32]| Slice {
            sequence: SequenceId(sequence),
            first_position: 7,
            tokens: tokens.into(),
            fed_back: None,
            pages: Arc::new(vec![4, 9]),
            sample: score.is_empty(),
            bars_stops: score.is_empty(),
            score: score.to_vec(),
            counts: score.is_empty().then(|| Arc::new(counts.to_vec())),
            mask: match id % 3 {
                0 => None,
                1 => Some(TokenMask::known(None)),
                _ => Some(TokenMask::known(Some(vec![u32::MAX, 1, 0]))),
            },
            request: Arc::new(request.clone()),
        };
        MicroBatch {
            id: MicroBatchId(id),
            slices: vec![slice(1, &[5], &[]), slice(u64::MAX, &[6, 7, 8, 9, 10], &[1, 2])],
        }
    }

    /// Those of [`batch`], of so many numbers a token.
    pub(crate) fn activations(hidden: usize, has_sums: bool) -> Activations {
        let number = |i: usize| (i as f32 * 0.37).sin() * 1e-30;
        let values: Vec<f32> = (0..6 * hidden).map(number).collect();
        let sums = has_sums.then(|| values.iter().map(|value| -value).collect::<Vec<f32>>().into());
        Activations { values: values.into(), sums, hidden }
    }

    /// A frame and its body.
    pub(crate) fn encoded(batch: &MicroBatch, content: &Content) -> (Frame, Vec<u8>) {
        let mut body = vec![7; 3];
        let frame = encode(batch, content, &mut body);
        (frame, body)
    }

    #[test]
    fn frames_come_back_as_they_were_made_and_nothing_shorter_passes_for_one() {
        let moved = |arrays| Content::Moved(Moved { arrays, rows: 6, hidden: 1 << 20 });
        let here = |hidden, has_sums| Content::Here(activations(hidden, has_sums));
        let pool = RowPool::default(); // Of all: what one leaves is not in the next.
        for (id, content) in (6..).zip([Content::Nothing, here(3, false), here(2, true), moved(1), moved(2)])
        {
            let (frame, body) = encoded(&batch(id), &content);
            let back = decode(&frame, &body, &pool).expect("a micro-batch");
            assert_eq!(format!("{back:?}"), format!("{:?}", (batch(id), content)));
            for length in 0..body.len() {
                assert!(decode(&frame, &body[..length], &pool).is_none(), "{length} bytes");
            }
        }
    }

    #[test]
    fn a_long_prompt_takes_no_more_bytes_than_a_short_one() {
        let mut long = batch(0);
        for slice in &mut long.slices {
            slice.request = Arc::new(Request { prompt: vec![5; 8192], ..Request::clone(&slice.request) });
        }
        let (_, body) = encoded(&long, &Content::Nothing);
        assert!(body == encoded(&batch(0), &Content::Nothing).1, "{} bytes", body.len());
    }

    #[test]
    fn numbers_come_into_memory_that_earlier_ones_have_left() {
        let pool = RowPool::default();
        let mut earlier = pool.rows();
        earlier.extend([0.5; 100]);
        let place = earlier.as_ptr();
        drop(earlier);
        let (frame, body) = encoded(&batch(0), &Content::Here(activations(3, false)));
        let decoded = decode(&frame, &body, &pool);
        let Some((_, Content::Here(back))) = decoded else { panic!("they came with it") };
        assert_eq!(on_host(&back.values).as_ptr(), place);
    }

    #[test]
    fn a_greeting_names_a_gpu_and_a_group_or_nothing() {
        let group: GroupId = std::array::from_fn(|byte| byte as u8 + 100);
        let said = greeting(5, &group);
        assert_eq!(read_greeting(&said), Some((5, group)));
        assert!(read_greeting(&[]).is_none() && read_greeting(&said[..said.len() - 1]).is_none());
    }

    #[test]
    fn bits_that_are_no_numbers_come_over_too() {
        let values = [f32::NAN, f32::NEG_INFINITY, -0.0, f32::from_bits(1), f32::MAX, 0.5];
        let sent = Activations { values: values.to_vec().into(), sums: None, hidden: 1 };
        let (frame, body) = encoded(&batch(0), &Content::Here(sent));
        let Some((_, Content::Here(back))) = decode(&frame, &body, &RowPool::default()) else {
            panic!("they came with it")
        };
        let bits = |values: &[f32]| values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
        assert_eq!(bits(on_host(&back.values)), bits(&values));
    }
}
