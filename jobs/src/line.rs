//! One row's answer as one line of JSON, in the shapes OpenAI's clients read.
//!
//! A line says nothing about when, where or how fast it was computed, but for `created`: the same row
//! gives the same bytes tomorrow. Keys stand in the order of the structs here.

use std::sync::Arc;

use scheduler::{Completion, Failure, FinishReason, RequestKey, TokenId};
use serde::Serialize;

use crate::error::RowError;
use crate::logprobs::{ChatLogprobs, CompletionLogprobs, TokenNames};
use crate::prepared::{Endpoint, PreparedRow, RejectedRow};
use crate::stop::Transcript;
use crate::tokenizer::Tokenizer;

/// A finished line, without its newline.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Line {
    /// Position of its row among those of the input.
    pub row: u64,
    /// Identity of the row.
    pub key: RequestKey,
    /// Where it belongs.
    pub file: LineFile,
    /// The row was refused without work: its line names a line number, and is made again by each run.
    pub is_refusal: bool,
    /// Tokens of the prompt that was answered.
    pub prompt_tokens: u64,
    /// Tokens generated for it.
    pub generated_tokens: u64,
    /// The text.
    pub json: String,
}

/// The files of lines.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LineFile {
    /// Answers.
    Output,
    /// Rows that have none.
    Errors,
    /// Lines of rows that have left the input.
    Stale,
}

impl LineFile {
    /// All of them.
    pub const ALL: [LineFile; 3] = [LineFile::Output, LineFile::Errors, LineFile::Stale];

    /// The file's name in the output folder.
    pub fn name(self) -> &'static str {
        match self {
            LineFile::Output => "output.jsonl",
            LineFile::Errors => "errors.jsonl",
            LineFile::Stale => "stale.jsonl",
        }
    }

    /// Its place in [`LineFile::ALL`].
    pub(crate) fn index(self) -> usize {
        self as usize
    }

    pub(crate) fn of_index(index: usize) -> Option<LineFile> {
        LineFile::ALL.get(index).copied()
    }
}

impl Line {
    /// The line of a sequence that has ended: an answer, or an error where it failed.
    ///
    /// `created` is the time of the answer in Unix seconds. A model without a tokenizer answers with
    /// token ids and an empty text.
    pub fn completed(
        row: &PreparedRow,
        completion: &Completion,
        tokenizer: Option<&Arc<Tokenizer>>,
        created: u64,
    ) -> Line {
        match completion.outcome {
            Ok(reason) => answer(row, completion, reason, tokenizer, created),
            Err(failure) => failed_sequence(row, failure),
        }
    }

    /// The line of a row that was rejected while it was read.
    pub fn rejected(row: &RejectedRow) -> Line {
        refusal(row.index, row.line, row.key, row.custom_id.as_deref(), &row.error)
    }

    /// The line of a row that was read and cannot be run, such as one too long for the KV cache.
    pub fn refused(row: &PreparedRow, error: &RowError) -> Line {
        refusal(row.index, row.line, row.request.key, Some(&row.custom_id), error)
    }
}

#[derive(Serialize)]
struct BatchLine<'a, B> {
    id: String,
    custom_id: Option<&'a str>,
    response: Option<Response<B>>,
    error: Option<LineError<'a>>,
}

#[derive(Serialize)]
struct Response<B> {
    status_code: u16,
    request_id: String,
    body: B,
}

/// Why there is no response at all.
#[derive(Serialize)]
struct LineError<'a> {
    code: &'a str,
    message: String,
}

#[derive(Serialize)]
struct RefusalBody<'a> {
    error: Refusal<'a>,
}

#[derive(Serialize)]
struct Refusal<'a> {
    message: &'a str,
    r#type: &'a str,
    param: Option<&'a str>,
    code: &'a str,
    line: u64,
}

#[derive(Serialize)]
struct AnswerBody<'a, C> {
    id: String,
    object: &'a str,
    created: u64,
    model: &'a str,
    choices: [C; 1],
    usage: Usage,
}

#[derive(Serialize)]
struct ChatChoice<'a> {
    index: u32,
    message: ChatMessage<'a>,
    logprobs: Option<ChatLogprobs>,
    finish_reason: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    token_ids: Option<&'a [TokenId]>,
}

#[derive(Serialize)]
struct ChatMessage<'a> {
    role: &'a str,
    content: &'a str,
    refusal: Option<&'a str>,
}

#[derive(Serialize)]
struct TextChoice<'a> {
    index: u32,
    text: &'a str,
    logprobs: Option<CompletionLogprobs>,
    finish_reason: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    token_ids: Option<&'a [TokenId]>,
}

/// Every token counts that was computed, those cut off by a stop string too.
#[derive(Serialize)]
struct Usage {
    prompt_tokens: usize,
    completion_tokens: usize,
    total_tokens: usize,
}

fn answer(
    row: &PreparedRow,
    completion: &Completion,
    reason: FinishReason,
    tokenizer: Option<&Arc<Tokenizer>>,
    created: u64,
) -> Line {
    let text = GeneratedText::read(completion, reason, tokenizer);
    let names = TokenNames(tokenizer.map(Arc::as_ref));
    let finish_reason = match reason {
        FinishReason::Stop => "stop",
        FinishReason::Length => "length",
    };
    let token_ids =
        (row.reply.token_ids || tokenizer.is_none()).then_some(completion.generated.tokens.as_slice());
    let wants_logprobs = row.request.sampling.logprobs.is_some();
    let json = match row.reply.endpoint {
        Endpoint::ChatCompletions => {
            let message = ChatMessage { role: "assistant", content: &text.text, refusal: None };
            let logprobs = wants_logprobs.then(|| ChatLogprobs::new(&names, &completion.generated.logprobs));
            let choice = ChatChoice { index: 0, message, logprobs, finish_reason, token_ids };
            answer_json(row, completion, "chatcmpl", "chat.completion", created, choice)
        }
        Endpoint::Completions => {
            let logprobs = wants_logprobs
                .then(|| CompletionLogprobs::new(&names, row, completion, &text.char_offsets()));
            let whole = format!("{}{}", row.reply.echo.as_deref().unwrap_or_default(), text.text);
            let choice = TextChoice { index: 0, text: &whole, logprobs, finish_reason, token_ids };
            answer_json(row, completion, "cmpl", "text_completion", created, choice)
        }
    };
    Line {
        row: row.index,
        key: row.request.key,
        file: LineFile::Output,
        is_refusal: false,
        prompt_tokens: completion.request.prompt.len() as u64,
        generated_tokens: completion.generated.tokens.len() as u64,
        json,
    }
}

fn answer_json(
    row: &PreparedRow,
    completion: &Completion,
    prefix: &str,
    object: &str,
    created: u64,
    choice: impl Serialize,
) -> String {
    let key = row.request.key;
    let (prompt_tokens, completion_tokens) = (row.request.prompt.len(), completion.generated.tokens.len());
    let usage = Usage { prompt_tokens, completion_tokens, total_tokens: prompt_tokens + completion_tokens };
    let id = format!("{prefix}-{}", hex(key));
    let body = AnswerBody { id, object, created, model: &row.reply.model, choices: [choice], usage };
    batch_line(key, Some(&row.custom_id), Ok((200, body)))
}

fn refusal(index: u64, line: u64, key: RequestKey, custom_id: Option<&str>, error: &RowError) -> Line {
    let error = Refusal {
        message: &error.message,
        r#type: "invalid_request_error",
        param: error.param.as_deref(),
        code: error.code,
        line,
    };
    let json = batch_line(key, custom_id, Ok((400, RefusalBody { error })));
    error_line(index, key, true, json)
}

fn failed_sequence(row: &PreparedRow, failure: Failure) -> Line {
    let code = match failure {
        Failure::NonFiniteLogits { .. } => "non_finite_logits",
        Failure::EndsStage => "ends_stage",
    };
    let error = LineError { code, message: failure.to_string() };
    let json = batch_line::<()>(row.request.key, Some(&row.custom_id), Err(error));
    error_line(row.index, row.request.key, false, json)
}

fn error_line(row: u64, key: RequestKey, is_refusal: bool, json: String) -> Line {
    Line { row, key, file: LineFile::Errors, is_refusal, prompt_tokens: 0, generated_tokens: 0, json }
}

fn batch_line<B: Serialize>(
    key: RequestKey,
    custom_id: Option<&str>,
    outcome: Result<(u16, B), LineError<'_>>,
) -> String {
    let id = format!("batch_req_{}", hex(key));
    let (response, error) = match outcome {
        Ok((status_code, body)) => {
            (Some(Response { status_code, request_id: format!("req_{}", hex(key)), body }), None)
        }
        Err(error) => (None, Some(error)),
    };
    serde_json::to_string(&BatchLine { id, custom_id, response, error }).expect("a line is JSON")
}

pub(crate) fn hex(key: RequestKey) -> String {
    format!("{:032x}", key.0)
}

/// What a sequence says, and where in it each token begins.
struct GeneratedText {
    text: String,
    // In bytes, one per generated token.
    offsets: Vec<usize>,
}

impl GeneratedText {
    fn read(completion: &Completion, reason: FinishReason, tokenizer: Option<&Arc<Tokenizer>>) -> Self {
        let Some(tokenizer) = tokenizer else {
            return GeneratedText {
                text: String::new(),
                offsets: vec![0; completion.generated.tokens.len()],
            };
        };
        let sampling = &completion.request.sampling;
        let ended_by_token = reason == FinishReason::Stop
            && completion
                .generated
                .tokens
                .last()
                .is_some_and(|token| sampling.stop_token_ids.contains(token));
        let num_spoken = completion.generated.tokens.len() - usize::from(ended_by_token);
        let mut transcript = Transcript::new(tokenizer.clone(), sampling);
        let mut offsets = Vec::with_capacity(completion.generated.tokens.len());
        for &token in &completion.generated.tokens[..num_spoken] {
            offsets.push(transcript.text().len());
            transcript.push(token);
        }
        let text = transcript.finish();
        offsets.resize(completion.generated.tokens.len(), text.len());
        GeneratedText { text, offsets }
    }

    /// The offsets in characters; those of tokens that were cut off lie at the end.
    fn char_offsets(&self) -> Vec<usize> {
        let mut chars = self.text.char_indices();
        let mut passed = 0;
        self.offsets
            .iter()
            .map(|&offset| {
                while chars.clone().next().is_some_and(|(start, _)| start < offset) {
                    chars.next();
                    passed += 1;
                }
                passed
            })
            .collect()
    }
}
