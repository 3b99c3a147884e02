//! A job as files: rows in, lines out, and the text of a model between them.
//!
//! [`Reader`] streams the input and turns each line into a request; [`Line`] turns what the pipeline
//! made of it into a line of output; [`Writer`] puts lines where they belong. The crate is plain
//! blocking code without threads of its own. It knows tokens and text, and no numbers of the model.
//!
//! Every row of the input comes out exactly once, as an answer or as an error. What happens to a row
//! depends on the row, the model and the job's settings, never on its neighbours; only identical rows
//! and repeated `custom_id`s look at what came before.
#![forbid(unsafe_code)]

mod detokenizer;
mod error;
mod line;
mod logprobs;
mod manifest;
mod prepared;
mod sampling;
mod spelling;
mod stop;
mod tokenizer;
mod writer;

pub use detokenizer::Detokenizer;
pub use error::{Error, Result, RowError};
pub use line::{Line, LineFile};
pub use manifest::{
    Counts, InputRecord, Manifest, ModelRecord, NumericProfile, Status, Timings, TokenTotals,
};
pub use prepared::{Endpoint, Message, PreparedRow, Prompt, RejectedRow, Reply, Row};
pub use sampling::{MAX_STOPS, SamplingOptions};
pub use stop::{StopMatcher, Transcript};
pub use tokenizer::Tokenizer;
pub use writer::{Order, Writer, Written};
