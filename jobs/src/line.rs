//! One row's answer as one line of JSON, in the shapes OpenAI's clients read.
//!
//! A line says nothing about when, where or how fast it was computed, but for `created`: the same row
//! gives the same bytes tomorrow. Keys stand in the order of the structs here.

use std::sync::Arc;

use scheduler::{Completion, Failure, FinishReason, RequestKey, TokenId};
use serde::Serialize;

use crate::error::RowError;
use crate::grade::Grade;
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
    /// The line of a row whose sequences have ended: an answer with a choice for each, or an error where
    /// one failed.
    ///
    /// `created` is the time of the answer in Unix seconds. A model without a tokenizer answers with
    /// token ids and an empty text.
    pub fn completed(
        row: &PreparedRow,
        completions: &[Completion],
        tokenizer: Option<&Arc<Tokenizer>>,
        created: u64,
    ) -> Line {
        match completions.iter().find_map(|completion| completion.outcome.err()) {
            None => answer(row, completions, tokenizer, created),
            Some(failure) => failed_sequence(row, failure),
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
    /// Not OpenAI's; there where the job grades its rows.
    #[serde(skip_serializing_if = "Option::is_none")]
    grade: Option<Grade>,
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
    choices: Vec<C>,
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
    completions: &[Completion],
    tokenizer: Option<&Arc<Tokenizer>>,
    created: u64,
) -> Line {
    let names = TokenNames(tokenizer.map(Arc::as_ref));
    let read = |completion| GeneratedText::read(completion, tokenizer);
    let texts: Vec<GeneratedText> = completions.iter().map(read).collect();
    let choices = (0..).zip(completions).zip(&texts).map(|((index, completion), text)| Choice {
        index,
        row,
        completion,
        text,
        names: &names,
    });
    let shape = Shape { row, completions, texts: &texts, created };
    let json = match row.reply.endpoint {
        Endpoint::ChatCompletions => {
            shape.json("chatcmpl", "chat.completion", choices.map(|choice| choice.chat()).collect())
        }
        Endpoint::Completions => {
            let wholes: Vec<String> = texts.iter().map(|text| echoed(row, text)).collect();
            let choices = choices.zip(&wholes).map(|(choice, whole)| choice.text(whole)).collect();
            shape.json("cmpl", "text_completion", choices)
        }
    };
    Line {
        row: row.index,
        key: row.request.key,
        file: LineFile::Output,
        is_refusal: false,
        prompt_tokens: row.request.prompt.len() as u64,
        generated_tokens: num_generated(completions) as u64,
        json,
    }
}

fn echoed(row: &PreparedRow, text: &GeneratedText) -> String {
    format!("{}{}", row.reply.echo.as_deref().unwrap_or_default(), text.text)
}

fn num_generated(completions: &[Completion]) -> usize {
    completions.iter().map(|completion| completion.generated.tokens.len()).sum()
}

/// One continuation of a row, before it has its shape.
struct Choice<'a> {
    index: u32,
    row: &'a PreparedRow,
    completion: &'a Completion,
    text: &'a GeneratedText,
    names: &'a TokenNames<'a>,
}

impl<'a> Choice<'a> {
    fn chat(&self) -> ChatChoice<'a> {
        let logprobs = &self.completion.generated.logprobs;
        ChatChoice {
            index: self.index,
            message: ChatMessage { role: "assistant", content: &self.text.text, refusal: None },
            logprobs: self.wants_logprobs().then(|| ChatLogprobs::new(self.names, logprobs)),
            finish_reason: self.finish_reason(),
            token_ids: self.token_ids(),
        }
    }

    fn text(&self, text: &'a str) -> TextChoice<'a> {
        let offsets = || self.text.char_offsets();
        TextChoice {
            index: self.index,
            text,
            logprobs: (self.wants_logprobs())
                .then(|| CompletionLogprobs::new(self.names, self.row, self.completion, &offsets())),
            finish_reason: self.finish_reason(),
            token_ids: self.token_ids(),
        }
    }

    fn wants_logprobs(&self) -> bool {
        self.row.request.sampling.logprobs.is_some()
    }

    fn finish_reason(&self) -> &'static str {
        match self.completion.outcome {
            Ok(FinishReason::Stop) => "stop",
            _ => "length",
        }
    }

    fn token_ids(&self) -> Option<&'a [TokenId]> {
        let is_wanted = self.row.reply.token_ids || self.names.0.is_none();
        is_wanted.then_some(self.completion.generated.tokens.as_slice())
    }
}

/// What all answers to a row have in common.
struct Shape<'a> {
    row: &'a PreparedRow,
    completions: &'a [Completion],
    texts: &'a [GeneratedText],
    created: u64,
}

impl Shape<'_> {
    fn json(&self, prefix: &str, object: &str, choices: Vec<impl Serialize>) -> String {
        let Shape { row, completions, texts, created } = *self;
        let key = row.request.key;
        let (prompt_tokens, completion_tokens) = (row.request.prompt.len(), num_generated(completions));
        let total_tokens = prompt_tokens + completion_tokens;
        let usage = Usage { prompt_tokens, completion_tokens, total_tokens };
        let id = format!("{prefix}-{}", hex(key));
        let body = AnswerBody { id, object, created, model: &row.reply.model, choices, usage };
        let grade = row.truth.as_ref().map(|truth| truth.grade(texts.iter().map(|text| text.text.as_str())));
        batch_line(key, Some(&row.custom_id), Ok((200, body)), grade)
    }
}

fn refusal(index: u64, line: u64, key: RequestKey, custom_id: Option<&str>, error: &RowError) -> Line {
    let error = Refusal {
        message: &error.message,
        r#type: "invalid_request_error",
        param: error.param.as_deref(),
        code: error.code,
        line,
    };
    let json = batch_line(key, custom_id, Ok((400, RefusalBody { error })), None);
    error_line(index, key, true, json)
}

fn failed_sequence(row: &PreparedRow, failure: Failure) -> Line {
    let code = match failure {
        Failure::NonFiniteLogits { .. } => "non_finite_logits",
        Failure::EndsStage => "ends_stage",
        Failure::NothingLeft { .. } => "nothing_left",
        Failure::GuideGaveUp { .. } => "guide_gave_up",
    };
    let error = LineError { code, message: failure.to_string() };
    let grade = row.truth.as_ref().map(|truth| truth.grade(std::iter::empty()));
    let json = batch_line::<()>(row.request.key, Some(&row.custom_id), Err(error), grade);
    error_line(row.index, row.request.key, false, json)
}

fn error_line(row: u64, key: RequestKey, is_refusal: bool, json: String) -> Line {
    Line { row, key, file: LineFile::Errors, is_refusal, prompt_tokens: 0, generated_tokens: 0, json }
}

fn batch_line<B: Serialize>(
    key: RequestKey,
    custom_id: Option<&str>,
    outcome: Result<(u16, B), LineError<'_>>,
    grade: Option<Grade>,
) -> String {
    let id = format!("batch_req_{}", hex(key));
    let (response, error) = match outcome {
        Ok((status_code, body)) => {
            (Some(Response { status_code, request_id: format!("req_{}", hex(key)), body }), None)
        }
        Err(error) => (None, Some(error)),
    };
    serde_json::to_string(&BatchLine { id, custom_id, response, error, grade }).expect("a line is JSON")
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
    fn read(completion: &Completion, tokenizer: Option<&Arc<Tokenizer>>) -> Self {
        let Some(tokenizer) = tokenizer else {
            return GeneratedText {
                text: String::new(),
                offsets: vec![0; completion.generated.tokens.len()],
            };
        };
        let sampling = &completion.request.sampling;
        let ended_by_token = completion.outcome == Ok(FinishReason::Stop)
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
