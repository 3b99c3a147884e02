//! What the reader hands out for each line of the input: a request, or why there is none.

use std::sync::Arc;

use scheduler::{Generated, Request, RequestKey, TokenId};

use crate::error::RowError;
use crate::grade::Truth;
use crate::journal::FinishedRow;

/// One line of the input.
#[derive(Debug)]
pub enum Row {
    /// A request, ready for the pipeline.
    Request(Box<PreparedRow>),
    /// A line that has no answer.
    Rejected(RejectedRow),
    /// A row that an earlier run has finished.
    Finished(FinishedRow),
}

/// A row whose prompt is tokenized, with what its output line needs beside the tokens.
#[derive(Debug, Clone)]
pub struct PreparedRow {
    /// Position among the rows of the input, from 0; blank lines do not count.
    pub index: u64,
    /// Line of the file, from 1.
    pub line: u64,
    /// The caller's name for the row.
    pub custom_id: String,
    /// What the pipeline is asked for the first choice.
    pub request: Arc<Request>,
    /// What earlier runs have of that choice.
    pub so_far: Generated,
    /// How the answer is to look.
    pub reply: Reply,
    /// What it is graded by, where it is.
    pub truth: Option<Truth>,
}

/// The route a body is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Endpoint {
    /// `/v1/chat/completions`.
    ChatCompletions,
    /// `/v1/completions`.
    Completions,
}

impl Endpoint {
    /// The route as a batch line names it.
    pub fn url(self) -> &'static str {
        match self {
            Endpoint::ChatCompletions => "/v1/chat/completions",
            Endpoint::Completions => "/v1/completions",
        }
    }
}

/// How the answer to a row is to look.
#[derive(Debug, Clone, PartialEq)]
pub struct Reply {
    /// Whose shape the body has.
    pub endpoint: Endpoint,
    /// The model's name as the request gave it, else the model directory's.
    pub model: String,
    /// The prompt's text, where it is repeated in front of the answer.
    pub echo: Option<String>,
    /// The choices carry the ids of the generated tokens.
    pub token_ids: bool,
    /// How many choices there are.
    pub choices: u32,
}

/// A line that has no answer.
#[derive(Debug, Clone, PartialEq)]
pub struct RejectedRow {
    /// Position among the rows of the input, from 0; blank lines do not count.
    pub index: u64,
    /// Line of the file, from 1.
    pub line: u64,
    /// The caller's name for the row, where the line has one.
    pub custom_id: Option<String>,
    /// Identity of the line's content.
    pub key: RequestKey,
    /// What is wrong.
    pub error: RowError,
}

/// A prompt before it is tokenized.
#[derive(Debug, Clone, PartialEq)]
pub enum Prompt {
    /// Messages for the chat template.
    Chat(Vec<Message>),
    /// Text as it is.
    Text(String),
    /// Token ids as they are.
    Tokens(Vec<TokenId>),
}

/// One message of a chat.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    /// Who speaks.
    pub role: String,
    /// What is said.
    pub content: String,
}

impl Message {
    /// A message.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Message { role: role.into(), content: content.into() }
    }
}
