//! How the ranks of a stage share the halves of each block: what a plan decides, a job keeps and all of its ranks are told.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// How ranks share a block's attention half.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum AttentionSharing {
    /// Each rank has some heads of every sequence. Where there are fewer KV heads than ranks, several have a copy of
    /// one, and some of its query heads. Of a linear half each has some columns of what it gives.
    #[default]
    Heads,
    /// Each rank has all heads of some sequences, those whose pages are its own: weights are there on every rank, keys and
    /// values once.
    Sequences,
    /// The first rank has all of it.
    FirstRank,
}

impl AttentionSharing {
    /// Every way.
    pub const ALL: [Self; 3] = [Self::Heads, Self::Sequences, Self::FirstRank];

    /// Those in which a sequence may have any page.
    pub const OF_ANY_PAGE: [Self; 2] = [Self::Heads, Self::FirstRank];
}

/// How ranks share a block's FFN half.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum FfnSharing {
    /// Each rank has some columns of gate and up, and the same of the inputs of down; of a linear half some columns of
    /// what it gives.
    #[default]
    Columns,
    /// The first rank has all of it.
    FirstRank,
}

/// How ranks share a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct BlockSharing {
    /// Its first half.
    pub attention: AttentionSharing,
    /// Its second half.
    pub ffn: FfnSharing,
}

/// How the ranks of a stage share its blocks: by heads and by columns but where something else is said of a half.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Sharing {
    /// Those that are not shared so in both halves.
    blocks: BTreeMap<usize, BlockSharing>,
}

/// The blocks of a [`Sharing`] whose halves are not shared by heads or by columns, in order, as files and messages have them.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Exceptions {
    /// Whose attention is shared by sequences.
    pub attention_by_sequences: Vec<usize>,
    /// Whose attention is the first rank's.
    pub attention_on_first_rank: Vec<usize>,
    /// Whose FFN is the first rank's.
    pub ffn_on_first_rank: Vec<usize>,
}

/// Blocks of which the same half is shared in the same way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Alike<'a> {
    /// Such as `attention`.
    pub half: &'static str,
    /// Such as `by sequences`.
    pub how: &'static str,
    /// Which blocks.
    pub blocks: &'a [usize],
}

impl Sharing {
    /// How a block is shared.
    pub fn of(&self, block: usize) -> BlockSharing {
        self.blocks.get(&block).copied().unwrap_or_default()
    }

    /// The same for all of these blocks.
    pub fn uniform(blocks: impl IntoIterator<Item = usize>, sharing: BlockSharing) -> Self {
        blocks.into_iter().map(|block| (block, sharing)).collect()
    }

    /// Whether ranks share out sequences in any block.
    pub fn has_sequences(&self) -> bool {
        self.blocks.values().any(|sharing| sharing.attention == AttentionSharing::Sequences)
    }

    /// What is not shared by heads and by columns.
    pub fn exceptions(&self) -> Exceptions {
        let mut exceptions = Exceptions::default();
        for (&block, sharing) in &self.blocks {
            match sharing.attention {
                AttentionSharing::Heads => {}
                AttentionSharing::Sequences => exceptions.attention_by_sequences.push(block),
                AttentionSharing::FirstRank => exceptions.attention_on_first_rank.push(block),
            }
            match sharing.ffn {
                FfnSharing::Columns => {}
                FfnSharing::FirstRank => exceptions.ffn_on_first_rank.push(block),
            }
        }
        exceptions
    }
}

impl FromIterator<(usize, BlockSharing)> for Sharing {
    fn from_iter<I: IntoIterator<Item = (usize, BlockSharing)>>(blocks: I) -> Self {
        let is_exception = |(_, sharing): &(usize, BlockSharing)| *sharing != BlockSharing::default();
        Sharing { blocks: blocks.into_iter().filter(is_exception).collect() }
    }
}

impl From<Exceptions> for Sharing {
    fn from(exceptions: Exceptions) -> Self {
        let mut blocks: BTreeMap<usize, BlockSharing> = BTreeMap::new();
        for block in exceptions.attention_by_sequences {
            blocks.entry(block).or_default().attention = AttentionSharing::Sequences;
        }
        for block in exceptions.attention_on_first_rank {
            blocks.entry(block).or_default().attention = AttentionSharing::FirstRank;
        }
        for block in exceptions.ffn_on_first_rank {
            blocks.entry(block).or_default().ffn = FfnSharing::FirstRank;
        }
        Sharing { blocks }
    }
}

impl Exceptions {
    /// They in words, as far as there are any.
    pub fn alike(&self) -> impl Iterator<Item = Alike<'_>> {
        let alike = |half, how, blocks| Alike { half, how, blocks };
        [
            alike("attention", "by sequences", &self.attention_by_sequences[..]),
            alike("attention", "on the first rank", &self.attention_on_first_rank),
            alike("FFN", "on the first rank", &self.ffn_on_first_rank),
        ]
        .into_iter()
        .filter(|alike| !alike.blocks.is_empty())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exceptions_say_all_that_a_sharing_does() {
        let [heads, sequences, first] =
            [AttentionSharing::Heads, AttentionSharing::Sequences, AttentionSharing::FirstRank];
        let blocks = [heads, sequences, first]
            .into_iter()
            .flat_map(|attention| [FfnSharing::Columns, FfnSharing::FirstRank].map(|ffn| (attention, ffn)))
            .map(|(attention, ffn)| BlockSharing { attention, ffn });
        let sharing: Sharing = (10..).zip(blocks).collect();
        let exceptions = sharing.exceptions();
        assert_eq!(exceptions.attention_by_sequences, [12, 13]);
        assert_eq!(exceptions.attention_on_first_rank, [14, 15]);
        assert_eq!(exceptions.ffn_on_first_rank, [11, 13, 15]);
        assert_eq!(Sharing::from(exceptions.clone()), sharing);
        let words: Vec<String> = exceptions
            .alike()
            .map(|alike| format!("{} {} {:?}", alike.half, alike.how, alike.blocks))
            .collect();
        assert_eq!(
            words,
            [
                "attention by sequences [12, 13]",
                "attention on the first rank [14, 15]",
                "FFN on the first rank [11, 13, 15]"
            ]
        );
    }

    #[test]
    fn blocks_that_are_shared_as_by_default_are_no_exceptions() {
        assert_eq!(Sharing::uniform(0..9, BlockSharing::default()), Sharing::default());
        assert_eq!(Exceptions::default().alike().count(), 0);
    }
}
