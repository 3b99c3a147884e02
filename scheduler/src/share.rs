//! How much of the work one micro-batch takes, so that all in flight are alike.
//!
//! The stages work at the same time only while each has a micro-batch, and none waits for another
//! only while the micro-batches take equally long. So the work at hand is counted in full, what is
//! on its way included, and each micro-batch takes an equal part of it: a greedy first one would
//! carry every decode and leave the other stages idle until it came back. As every sequence
//! returns to one queue, a micro-batch that has become too large sheds its excess to the next one
//! within a round. Nothing here remembers anything.
//!
//! Little work goes in few micro-batches, for each reads all weights: but in no fewer than there are memories to read them from at
//! once, some of which would be idle. With rows for fewer tokens than each of S + 1 micro-batches had to have, S stages with
//! a memory each are as busy with S of them, which read the weights once less: a round takes S times a step and not S + 1
//! times one that takes as long. What contexts add to a step is proportional to its rows, and changes none of this.
//!
//! A lone stage shares nothing out: a micro-batch takes all that can go, and so does the one behind it, where sequences
//! run ahead of their tokens.

use crate::options::Options;

/// The work at hand when a micro-batch is to be composed.
#[derive(Debug, Clone, Copy)]
pub(crate) struct AtHand {
    pub(crate) micro_batches_in_flight: usize,
    pub(crate) tokens_in_flight: usize,
    /// Sequences that are past their prefill, in flight or ready for their next step.
    pub(crate) decoding: usize,
    /// Tokens that could go now: a decode step of each ready sequence and all admitted prefill.
    pub(crate) tokens_at_hand: usize,
    /// Whether sequences in flight may go again, where tokens are fed back.
    pub(crate) runs_ahead: bool,
}

/// The most that the next micro-batch takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Share {
    /// Decode steps.
    pub(crate) decodes: usize,
    /// Tokens altogether.
    pub(crate) tokens: usize,
}

/// The next micro-batch's part of `work`, or nothing while enough micro-batches are in flight.
pub(crate) fn next_share(options: &Options, work: AtHand) -> Option<Share> {
    if work.tokens_at_hand == 0 {
        return None;
    }
    if options.num_stages == 1 {
        let most = options.most_in_flight(work.runs_ahead);
        let tokens = work.tokens_at_hand.min(options.micro_batch_tokens);
        return (work.micro_batches_in_flight < most)
            .then_some(Share { decodes: work.decoding.min(tokens), tokens });
    }
    let total = work.tokens_in_flight + work.tokens_at_hand;
    // A token budget below the efficient size says that somebody wants them that small.
    let efficient = options.efficient_tokens.min(options.micro_batch_tokens);
    let least = options.num_memories.min(total);
    let parts = (total / efficient).clamp(least, options.max_in_flight());
    if work.micro_batches_in_flight >= parts {
        return None;
    }
    let tokens = total.div_ceil(parts).min(options.micro_batch_tokens);
    Some(Share { decodes: work.decoding.div_ceil(parts).min(tokens), tokens })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(num_stages: usize) -> Options {
        Options {
            num_stages,
            micro_batch_tokens: 512,
            max_sequences: 256,
            num_pages: 1024,
            num_lanes: 1,
            page_tokens: 16,
            context_tokens: 2048,
            efficient_tokens: 16,
            num_memories: 1,
            feeds_back: false,
            is_ahead: false,
        }
    }

    fn share(num_stages: usize, in_flight: &[usize], ready: usize, prefill: usize) -> Option<Share> {
        let tokens_in_flight = in_flight.iter().sum();
        let work = AtHand {
            micro_batches_in_flight: in_flight.len(),
            tokens_in_flight,
            decoding: tokens_in_flight + ready,
            tokens_at_hand: ready + prefill,
            runs_ahead: true,
        };
        next_share(&options(num_stages), work)
    }

    #[test]
    fn decodes_are_shared_out_over_one_micro_batch_more_than_stages() {
        assert_eq!(share(2, &[], 64, 0), Some(Share { decodes: 22, tokens: 22 }));
        assert_eq!(share(2, &[22], 42, 0), Some(Share { decodes: 22, tokens: 22 }));
        assert_eq!(share(2, &[22, 22], 20, 0), Some(Share { decodes: 22, tokens: 22 }));
        assert_eq!(share(2, &[22, 22, 16], 4, 0), None);
    }

    #[test]
    fn a_single_stage_has_one_micro_batch_with_all_that_is_ready() {
        assert_eq!(share(1, &[], 64, 100), Some(Share { decodes: 64, tokens: 164 }));
        assert_eq!(share(1, &[64], 4, 0), None);
    }

    #[test]
    fn a_single_stage_that_feeds_back_has_another_behind_it_where_all_may_run_ahead() {
        let options = Options { feeds_back: true, ..options(1) };
        let work = |micro_batches_in_flight, runs_ahead| AtHand {
            micro_batches_in_flight,
            tokens_in_flight: 64 * micro_batches_in_flight,
            decoding: 64 * (1 + micro_batches_in_flight),
            tokens_at_hand: 64,
            runs_ahead,
        };
        let all = Some(Share { decodes: 64, tokens: 64 });
        assert_eq!([0, 1, 2].map(|flying| next_share(&options, work(flying, true))), [all, all, None]);
        assert_eq!([0, 1].map(|flying| next_share(&options, work(flying, false))), [all, None]);
    }

    #[test]
    fn little_work_goes_in_fewer_micro_batches_of_the_efficient_size() {
        assert_eq!(share(4, &[], 64, 0), Some(Share { decodes: 16, tokens: 16 }));
        assert_eq!(share(4, &[16, 16, 16], 16, 0), Some(Share { decodes: 16, tokens: 16 }));
        assert_eq!(share(4, &[16, 16, 16, 15], 1, 0), None);
        assert_eq!(share(4, &[], 31, 0), Some(Share { decodes: 31, tokens: 31 }));
        assert_eq!(share(4, &[3], 1, 0), None);
    }

    #[test]
    fn little_work_goes_in_no_fewer_micro_batches_than_there_are_memories() {
        let share = |rows: usize| {
            let work = AtHand {
                micro_batches_in_flight: 0,
                tokens_in_flight: 0,
                decoding: rows,
                tokens_at_hand: rows,
                runs_ahead: false,
            };
            let options = Options { num_memories: 4, efficient_tokens: 184, ..options(4) };
            next_share(&options, work).unwrap().tokens
        };
        assert_eq!([1, 3, 4, 256, 736, 919].map(share), [1, 1, 1, 64, 184, 230]);
        // Each of five is large enough.
        assert_eq!(share(920), 184);
    }

    #[test]
    fn prefill_fills_the_micro_batches_evenly_and_within_the_token_budget() {
        assert_eq!(share(2, &[], 60, 100), Some(Share { decodes: 20, tokens: 54 }));
        assert_eq!(share(2, &[], 60, 10_000), Some(Share { decodes: 20, tokens: 512 }));
    }

    #[test]
    fn there_is_no_share_of_nothing() {
        assert_eq!(share(2, &[], 0, 0), None);
        assert_eq!(share(2, &[8], 0, 0), None);
    }
}
