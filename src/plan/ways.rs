//! In which ways the devices of a stage may share blocks, for plans and runs. Which of them is taken is for memory to say too: see
//! [`lanes`](crate::lanes).

use configs::SplitBlocks;
use stages::cost::{CostModel, Load, PieceShape};
use stages::{AttentionSharing, Sharing};

use crate::plan::setting::Setting;

impl Setting {
    /// The ways that there are in stages of such widths: as costs say, the same with heads in the place of sequences, and all halves
    /// by heads and by columns. Each is slower than the one before where memory is no question; the last has the fewest weights.
    pub(crate) fn ways_to_share(&self, widths: &[usize]) -> Vec<Self> {
        let are_shared = widths.iter().any(|width| *width > 1);
        match self.split_blocks {
            SplitBlocks::Auto if are_shared => vec![
                self.clone(),
                Setting { may_share_sequences: false, ..self.clone() },
                Setting { split_blocks: SplitBlocks::All, ..self.clone() },
            ],
            SplitBlocks::Auto | SplitBlocks::All => vec![self.clone()],
        }
    }

    /// How the devices of a stage of `width` share its blocks, which is for costs to say unless the job says it, or another way is
    /// taken.
    pub(crate) fn sharing(
        &self,
        costs: &dyn CostModel,
        pieces: &[PieceShape],
        width: usize,
        load: Load,
    ) -> Sharing {
        match self.split_blocks {
            SplitBlocks::Auto if self.may_share_sequences => costs.sharing(pieces, width, load),
            SplitBlocks::Auto => costs.sharing_in(&AttentionSharing::OF_ANY_PAGE, pieces, width, load),
            SplitBlocks::All => Sharing::default(),
        }
    }
}
