//! Tokens of rows that have no line yet, so that a crash costs a prefill and not their decoding.
//!
//! They come in pieces, each of the tokens since the one before. A piece replaces all that was there from
//! its first token on, so that what is written twice counts once; one that does not follow on the others
//! is as good as none.

use std::collections::HashMap;
use std::collections::hash_map::Entry;

use rusqlite::{Connection, params};
use scheduler::{Generated, RequestKey, TokenId, TokenLogprobs};
use wincode::config::{Configuration, deserialize_exact, serialize};

/// Rows with pieces in the journal, and how many tokens each has.
#[derive(Debug, Clone, Default)]
pub(super) struct Checkpointed(HashMap<RequestKey, u64>);

impl Checkpointed {
    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// All tokens.
    pub(super) fn tokens(&self) -> u64 {
        self.0.values().sum()
    }

    /// Adds pieces in the order of their making.
    pub(super) fn add(
        &mut self,
        db: &Connection,
        pieces: &[(RequestKey, u64, Generated)],
    ) -> rusqlite::Result<()> {
        let mut cut = db.prepare_cached("DELETE FROM checkpoints WHERE key = ? AND first >= ?")?;
        let mut add = db.prepare_cached("INSERT INTO checkpoints VALUES (?, ?, ?, ?)")?;
        for (key, first, more) in pieces {
            let tokens = more.tokens.len() as u64;
            let bytes = key.0.to_be_bytes();
            cut.execute(params![bytes, *first as i64])?;
            add.execute(params![bytes, *first as i64, tokens as i64, encode(more)])?;
            let known = self.0.entry(*key).or_default();
            if *first <= *known {
                *known = first + tokens;
            }
        }
        Ok(())
    }

    /// These rows have their lines.
    pub(super) fn remove(
        &mut self,
        db: &Connection,
        keys: impl Iterator<Item = RequestKey>,
    ) -> rusqlite::Result<()> {
        let mut remove = db.prepare_cached("DELETE FROM checkpoints WHERE key = ?")?;
        for key in keys {
            if let Entry::Occupied(known) = self.0.entry(key) {
                remove.execute([key.0.to_be_bytes()])?;
                known.remove();
            }
        }
        Ok(())
    }
}

/// Which rows have pieces, and what these sum up to.
pub(super) fn load(db: &Connection) -> rusqlite::Result<(Checkpointed, HashMap<RequestKey, Generated>)> {
    let mut all = HashMap::<RequestKey, Generated>::new();
    let mut statement = db.prepare("SELECT key, first, piece FROM checkpoints ORDER BY key, first")?;
    let mut pieces = statement.query([])?;
    while let Some(piece) = pieces.next()? {
        let so_far = all.entry(RequestKey(u128::from_be_bytes(piece.get(0)?))).or_default();
        let first = piece.get::<_, i64>(1)? as usize;
        if first <= so_far.tokens.len()
            && let Some(more) = decode(piece.get_ref(2)?.as_blob()?)
        {
            append(so_far, first, more);
        }
    }
    let known = all.iter().map(|(key, so_far)| (*key, so_far.tokens.len() as u64)).collect();
    all.retain(|_, so_far| !so_far.tokens.is_empty());
    Ok((Checkpointed(known), all))
}

/// Puts a piece in the place of what there is from its first token on.
fn append(so_far: &mut Generated, first: usize, more: Generated) {
    so_far.tokens.truncate(first);
    so_far.tokens.extend(more.tokens);
    so_far.logprobs.truncate(first);
    so_far.logprobs.extend(more.logprobs);
    if first == 0 {
        so_far.prompt_logprobs = more.prompt_logprobs;
    }
}

/// A token with its log-probability, and the most likely ones. Tuples, for the code that wincode
/// derives is none that this crate allows.
type Score = (TokenId, f32, Vec<(TokenId, f32)>);

/// Tokens, their scores, and those of the prompt.
type Piece = (Vec<TokenId>, Vec<Score>, Vec<Score>);

/// Scores of a prompt of 128 k tokens are more than the 4 MiB that wincode allows by itself. The pieces
/// are our own: SQLite has checked that they are whole, and 1 GiB is its own limit of a value.
const FORMAT: Configuration<true, { 1 << 30 }> =
    Configuration::default().with_preallocation_size_limit::<{ 1 << 30 }>();

fn encode(more: &Generated) -> Vec<u8> {
    let scores = |entries: &[TokenLogprobs]| {
        entries.iter().map(|entry| (entry.token, entry.logprob, entry.top.clone())).collect()
    };
    let piece: Piece = (more.tokens.clone(), scores(&more.logprobs), scores(&more.prompt_logprobs));
    serialize(&piece, FORMAT).expect("memory takes a piece")
}

fn decode(bytes: &[u8]) -> Option<Generated> {
    let (tokens, logprobs, prompt_logprobs) = deserialize_exact::<Piece, _>(bytes, FORMAT).ok()?;
    let scores = |scores: Vec<Score>| {
        let entry = |(token, logprob, top)| TokenLogprobs { token, logprob, top };
        scores.into_iter().map(entry).collect()
    };
    Some(Generated { tokens, logprobs: scores(logprobs), prompt_logprobs: scores(prompt_logprobs) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_piece_comes_back_with_every_bit() {
        let entry = |bits: u32| TokenLogprobs {
            token: bits,
            logprob: f32::from_bits(bits),
            top: vec![(bits, f32::from_bits(!bits)); bits as usize % 3],
        };
        // A NaN with a payload, infinities, denormals, negative zero.
        let odd = [0x7fc0_1234, 0xff80_0000, 0x7f80_0000, 1, 0x8000_0000, 0xbf00_0001];
        let piece = Generated {
            tokens: vec![0, u32::MAX, 7],
            logprobs: odd.map(entry).to_vec(),
            prompt_logprobs: (0..200_000).map(entry).collect(),
        };
        let back = decode(&encode(&piece)).unwrap();
        assert_eq!(encode(&back), encode(&piece));
        assert_eq!(back.tokens, piece.tokens);
        let bits = |entries: &[TokenLogprobs]| -> Vec<_> {
            entries.iter().map(|entry| (entry.logprob.to_bits(), entry.top.len())).collect()
        };
        assert_eq!(bits(&back.logprobs), bits(&piece.logprobs));
        assert_eq!(bits(&back.prompt_logprobs), bits(&piece.prompt_logprobs));
        assert_eq!(decode(&encode(&piece)[1..]), None);
        assert_eq!(decode(b""), None);
    }
}
