//! How often each token stands in a sequence: what penalties are made of.
//!
//! Counts follow from the tokens alone, so that they are the same after a preemption and after a restart. They travel with the
//! slice that draws, and no stage keeps any.

use crate::request::TokenId;

/// A token that stands in a sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TokenCount {
    /// Which.
    pub token: TokenId,
    /// How often it was generated.
    pub generated: u32,
    /// Whether it stands in the prompt.
    pub in_prompt: bool,
}

/// Each token of a sequence once, by rising id.
pub(crate) fn count(prompt: &[TokenId], generated: &[TokenId]) -> Vec<TokenCount> {
    let of = |tokens: &[TokenId], in_prompt: bool| {
        let count = |&token: &TokenId| TokenCount { token, generated: u32::from(!in_prompt), in_prompt };
        tokens.iter().map(count).collect::<Vec<_>>()
    };
    let mut counts = of(prompt, true);
    counts.extend(of(generated, false));
    counts.sort_unstable_by_key(|count| count.token);
    counts.dedup_by(|next, kept| {
        let is_same = next.token == kept.token;
        if is_same {
            kept.generated += next.generated;
            kept.in_prompt |= next.in_prompt;
        }
        is_same
    });
    counts
}

/// Counts a token that was generated.
pub(crate) fn add(counts: &mut Vec<TokenCount>, token: TokenId) {
    match counts.binary_search_by_key(&token, |count| count.token) {
        Ok(at) => counts[at].generated += 1,
        Err(at) => counts.insert(at, TokenCount { token, generated: 1, in_prompt: false }),
    }
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn counts_that_grew_are_those_of_all_tokens(
            prompt in vec(0..20u32, 0..30), generated in vec(0..20u32, 0..30), so_far in 0..30usize,
        ) {
            let so_far = so_far.min(generated.len());
            let mut grown = count(&prompt, &generated[..so_far]);
            generated[so_far..].iter().for_each(|&token| add(&mut grown, token));
            prop_assert_eq!(&grown, &count(&prompt, &generated));
            let expected: Vec<TokenCount> = (0..20)
                .map(|token| TokenCount {
                    token,
                    generated: generated.iter().filter(|&&other| other == token).count() as u32,
                    in_prompt: prompt.contains(&token),
                })
                .filter(|count| count.in_prompt || count.generated > 0)
                .collect();
            prop_assert_eq!(grown, expected);
        }
    }
}
