//! A job as files: rows in, lines out, and the text of a model between them.
//!
//! [`Reader`] streams the input and turns each line into a request; [`Line`] turns what the pipeline
//! made of it into a line of output; [`Writer`] puts lines where they belong, and a journal in the
//! [`OutputFolder`] remembers which rows have theirs. [`JobStatus`] and [`Audit`] look on from outside.
//! The crate is plain blocking code; its one thread lends a template the stack to be read. It knows tokens
//! and text, and no numbers of the model.
//!
//! Every row of the input comes out exactly once, as an answer or as an error. What happens to a row
//! depends on the row, the model and the job's settings, never on its neighbours; only identical rows
//! and repeated `custom_id`s look at what came before.
#![forbid(unsafe_code)]

mod audit;
mod batch_line;
mod bit_set;
mod body;
mod calendar;
mod chat_template;
mod detokenizer;
mod digest_map;
mod disk;
mod error;
mod failures;
pub mod faults;
mod folder;
mod format_width;
mod generation_config;
mod grade;
mod guides;
mod journal;
mod json;
mod key;
mod line;
mod lines_file;
mod logprobs;
mod manifest;
mod model_text;
mod own_files;
mod parameters;
mod plain_row;
mod prepare;
mod prepared;
mod raw_lines;
mod reader;
mod row_keys;
mod sampling;
mod settings;
mod settle;
mod spelling;
mod status;
mod stop;
mod template;
mod tokenizer;
mod writer;

pub use audit::{Audit, AuditOptions, Finding};
pub use detokenizer::Detokenizer;
pub use error::{Error, Result, RowError};
pub use failures::{Failures, FirstFailure};
pub use folder::{FolderLock, OutputFolder};
pub use grade::{Grader, Score, Scores, Truth};
pub use guides::{Follower, Guides};
pub use journal::{EarlierRuns, Entry, FinishedRow, FinishedRows, JournalView, Progress};
pub use line::{Line, LineFile};
pub use manifest::{
    Counts, FailedReplica, InputRecord, Manifest, ModelRecord, NumericProfile, RankRecord, StageRecord,
    Status, Timings, TokenTotals,
};
pub use model_text::{ModelText, ModelTextOptions};
pub use own_files::check_paths;
pub use plain_row::PromptOptions;
pub use prepare::{Preparer, RowOptions};
pub use prepared::{Endpoint, Message, PreparedRow, Prompt, RejectedRow, Reply, Row};
pub use reader::{MAX_LINE_BYTES, Reader};
pub use sampling::{MAX_CHOICES, MAX_STOPS, SamplingOptions};
pub use settings::{Named, Settings, StageShape};
pub use status::{JobPhase, JobStatus};
pub use stop::{StopMatcher, Transcript};
pub use tokenizer::Tokenizer;
pub use writer::{Order, Unread, Writer, Written};
