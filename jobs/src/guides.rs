//! Guides: schemas, regular expressions, lists of choices and grammars that an answer must match, followed token by token.
//!
//! A guide is compiled over the tokenizer's bytes. What it allows next is a function of the tokens so far alone, so that a row
//! which is preempted, or goes on in another run, has the same masks. How much work a guide may make is bounded by
//! counts and by no clock; one that is beyond it is refused, or fails its row.

use std::collections::{HashMap, VecDeque};
use std::panic::AssertUnwindSafe;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use llguidance::api::TopLevelGrammar;
use llguidance::earley::SlicedBiasComputer;
use llguidance::toktrie::{ApproximateTokEnv, InferenceCapabilities, TokEnv, TokRxInfo, TokTrie};
use llguidance::{Matcher, ParserFactory, panic_utils};
use scheduler::{Guide, TokenId};
use serde_json::{Value, json};

use crate::tokenizer::Tokenizer;

/// Guides that are kept compiled until somebody says how many it needs, as many as rows wait for a pipeline by default.
const KEPT: usize = 256;

/// No more are kept, however many rows wait for GPUs: a compiled guide may take megabytes.
const MOST_KEPT: usize = 1024;

/// Longest text of a guide, in bytes.
const MAX_BYTES: usize = 1 << 20;

/// Brackets that may be open in a guide at once: compiling goes down as deep as they do.
const MAX_DEPTH: usize = 256;

/// Most characters of what a compiler says that a message has.
const MAX_MESSAGE_CHARS: usize = 300;

/// Compiles the guides of one model's rows.
pub struct Guides {
    tokenizer: Arc<Tokenizer>,
    vocab_size: usize,
    eos_token_ids: Vec<TokenId>,
    /// Made when a row first needs it: a trie of all tokens.
    factory: OnceLock<Result<ParserFactory, String>>,
    kept: Mutex<Kept>,
}

/// A guide that is compiled, or about to be. Whoever comes first compiles it, and others wait for it alone.
type Cell = Arc<Mutex<Option<Result<Matcher, String>>>>;

/// The latest guides. Jobs have one or a few; one that was dropped is compiled again.
struct Kept {
    most: usize,
    cells: HashMap<Arc<Guide>, Cell>,
    /// From the oldest to the newest.
    order: VecDeque<Arc<Guide>>,
}

impl Kept {
    fn cell(&mut self, guide: &Guide) -> Cell {
        if let Some(cell) = self.cells.get(guide) {
            return Arc::clone(cell);
        }
        while self.order.len() >= self.most
            && let Some(oldest) = self.order.pop_front()
        {
            self.cells.remove(&oldest);
        }
        let guide = Arc::new(guide.clone());
        self.order.push_back(Arc::clone(&guide));
        Arc::clone(self.cells.entry(guide).or_default())
    }
}

impl Guides {
    /// For a model that knows `vocab_size` tokens, of which these end a sequence.
    pub(crate) fn new(tokenizer: Arc<Tokenizer>, vocab_size: usize, eos_token_ids: Vec<TokenId>) -> Guides {
        let kept = Mutex::new(Kept { most: KEPT, cells: HashMap::new(), order: VecDeque::new() });
        Guides { tokenizer, vocab_size, eos_token_ids, factory: OnceLock::new(), kept }
    }

    /// Keeps the guides of so many rows, a thousand at most: as many as may be under way from the reader, which compiles them, to a pipeline.
    pub fn keep(&self, rows: usize) {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner).most = rows.min(MOST_KEPT);
    }

    /// Whether a guide can be followed; else what is wrong with it.
    pub(crate) fn check(&self, guide: &Guide) -> Result<(), String> {
        self.compiled(guide, |_| ())
    }

    /// Follows a guide from the beginning of an answer.
    ///
    /// # Errors
    /// What is wrong with it, which [`crate::Preparer`] has found before.
    pub fn follow(&self, guide: &Guide) -> Result<Follower, String> {
        // With caches of its own: what another row has come by must not decide when this one has cost too much.
        let matcher = self.compiled(guide, Matcher::deep_clone)?;
        Ok(Follower { matcher, vocab_size: self.vocab_size })
    }

    fn compiled<T>(&self, guide: &Guide, look: impl FnOnce(&Matcher) -> T) -> Result<T, String> {
        // Compiling may take long: no other guide waits for it.
        let cell = self.kept.lock().unwrap_or_else(PoisonError::into_inner).cell(guide);
        let mut compiled = cell.lock().unwrap_or_else(PoisonError::into_inner);
        compiled.get_or_insert_with(|| self.compile(guide)).as_ref().map(look).map_err(Clone::clone)
    }

    fn compile(&self, guide: &Guide) -> Result<Matcher, String> {
        let factory = self.factory.get_or_init(|| self.factory()).as_ref().map_err(Clone::clone)?;
        let grammar = grammar(guide)?;
        let parser = panic_utils::catch_unwind(AssertUnwindSafe(|| factory.create_parser(grammar)));
        let mut matcher = Matcher::new(parser);
        // Only the first mask shows that a grammar allows nothing at all.
        match matcher
            .get_error()
            .map_or_else(|| matcher.compute_mask_or_eos().map_err(|e| e.to_string()), Err)
        {
            Ok(_) => Ok(matcher),
            Err(error) => Err(shortened(&error)),
        }
    }

    fn factory(&self) -> Result<ParserFactory, String> {
        let Some((&first, _)) = self.eos_token_ids.split_first() else {
            return Err("the model names no token that ends a sequence".to_owned());
        };
        if !self.tokenizer.spells_by_bytes() {
            return Err("the text of the model's tokens depends on their neighbours".to_owned());
        }
        let make = || {
            let info = TokRxInfo::new(self.vocab_size as u32, first);
            let words: Vec<Vec<u8>> = (0..self.vocab_size as TokenId).map(|token| self.word(token)).collect();
            let trie = TokTrie::from(&info, &words).with_eos_tokens(&self.eos_token_ids);
            let tokens: TokEnv = Arc::new(ApproximateTokEnv::new(trie));
            // Of the parts of the vocabulary that fit into JSON's strings masks are worked out once.
            let slices = SlicedBiasComputer::general_slices();
            ParserFactory::new(&tokens, InferenceCapabilities::default(), &slices)
        };
        let mut factory = panic_utils::catch_unwind(AssertUnwindSafe(make))
            .map_err(|error| shortened(&error.to_string()))?;
        factory.quiet();
        factory.limits_mut().verbose_errors = false;
        Ok(factory)
    }

    /// A token's bytes; one that is left out of texts is marked, and matches none. One that stands for nothing has none.
    fn word(&self, token: TokenId) -> Vec<u8> {
        let bytes = self.tokenizer.token_bytes(token).unwrap_or_default();
        if self.tokenizer.is_special(token) || self.eos_token_ids.contains(&token) {
            return [&[TokTrie::SPECIAL_TOKEN_MARKER], bytes].concat();
        }
        // A token of the byte that marks is no part of any UTF-8.
        if bytes.first() == Some(&TokTrie::SPECIAL_TOKEN_MARKER) { Vec::new() } else { bytes.to_vec() }
    }
}

/// One answer on its way through a guide.
pub struct Follower {
    matcher: Matcher,
    vocab_size: usize,
}

impl Follower {
    /// Goes on by tokens that its masks allowed, none of which ends the sequence.
    ///
    /// # Errors
    /// A token that it does not allow, or a guide that costs too much.
    pub fn take(&mut self, tokens: &[TokenId]) -> Result<(), String> {
        self.matcher.consume_tokens(tokens).map_err(|error| shortened(&error.to_string()))
    }

    /// A bit for each token of the vocabulary, from the lowest of each word on: 0 bars the token. Where nothing can follow, and
    /// where the answer may end, those that end a sequence are allowed.
    ///
    /// # Errors
    /// A guide that costs too much.
    pub fn mask(&mut self) -> Result<Vec<u32>, String> {
        let mask = self.matcher.compute_mask_or_eos().map_err(|error| shortened(&error.to_string()))?;
        let mut words = mask.as_slice().to_vec();
        words.resize(self.vocab_size.div_ceil(32), 0);
        if let (Some(last), used @ 1..) = (words.last_mut(), self.vocab_size % 32) {
            *last &= (1 << used) - 1;
        }
        Ok(words)
    }
}

fn grammar(guide: &Guide) -> Result<TopLevelGrammar, String> {
    check_size(guide)?;
    Ok(match guide {
        Guide::Json { schema, any_space } => {
            TopLevelGrammar::from_json_schema(with_space(schema, *any_space)?)
        }
        Guide::Regex(regex) => TopLevelGrammar::from_regex(regex),
        Guide::Choice(texts) => {
            let texts: Vec<String> = texts.iter().map(|text| crate::json::quoted(text)).collect();
            TopLevelGrammar::from_lark(format!("start: {}", texts.join(" | ")))
        }
        Guide::Grammar(grammar) => TopLevelGrammar::from_lark(grammar.clone()),
    })
}

fn check_size(guide: &Guide) -> Result<(), String> {
    let texts = match guide {
        Guide::Json { schema: text, .. } | Guide::Regex(text) | Guide::Grammar(text) => {
            std::slice::from_ref(text)
        }
        Guide::Choice(texts) => texts,
    };
    let bytes: usize = texts.iter().map(String::len).sum();
    if bytes > MAX_BYTES {
        return Err(format!("expected at most {MAX_BYTES} bytes, found {bytes}"));
    }
    let depth = |text: &String| {
        let (mut open, mut most) = (0usize, 0);
        for byte in text.bytes() {
            match byte {
                b'(' | b'[' | b'{' => open += 1,
                b')' | b']' | b'}' => open = open.saturating_sub(1),
                _ => {}
            }
            most = most.max(open);
        }
        most
    };
    // The texts of a choice are no grammar.
    let is_nested = !matches!(guide, Guide::Choice(_));
    match texts.iter().map(depth).max().filter(|&most| is_nested && most > MAX_DEPTH) {
        Some(most) => Err(format!("expected at most {MAX_DEPTH} brackets open at once, found {most}")),
        None => Ok(()),
    }
}

/// The schema, with what the compiler is told beside it.
fn with_space(schema: &str, any_space: bool) -> Result<Value, String> {
    let mut schema: Value = serde_json::from_str(schema).map_err(|error| format!("not JSON: {error}"))?;
    if let Value::Bool(true) = schema {
        schema = json!({});
    }
    let Some(fields) = schema.as_object_mut() else {
        return Err(format!("expected a schema, which is an object, found {}", crate::json::show(&schema)));
    };
    if fields.contains_key("x-guidance") {
        return Err("x-guidance: not supported".to_owned());
    }
    fields.insert("x-guidance".to_owned(), json!({"whitespace_flexible": any_space}));
    Ok(schema)
}

/// What a compiler says, on one line.
fn shortened(message: &str) -> String {
    let line = message.split_whitespace().collect::<Vec<_>>().join(" ");
    let mut chars = line.chars();
    let short: String = chars.by_ref().take(MAX_MESSAGE_CHARS).collect();
    if chars.next().is_some() { format!("{short}…") } else { short }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn guide(number: usize) -> Guide {
        Guide::Regex(number.to_string())
    }

    #[test]
    fn the_oldest_guide_makes_room_for_a_new_one() {
        let mut kept = Kept { most: 3, cells: HashMap::new(), order: VecDeque::new() };
        let cells: Vec<Cell> = (0..4).map(|number| kept.cell(&guide(number))).collect();
        let is_kept =
            |number: usize, kept: &mut Kept| Arc::ptr_eq(&cells[number], &kept.cell(&guide(number)));
        assert!((1..4).all(|number| is_kept(number, &mut kept)));
        assert!(!is_kept(0, &mut kept) && !is_kept(1, &mut kept) && is_kept(3, &mut kept));
        assert_eq!((kept.cells.len(), kept.order.len()), (3, 3));
    }

    #[test]
    fn a_guide_that_is_being_compiled_keeps_no_other_waiting() {
        let words = json!({"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"});
        let tokenizer = json!({"version": "1.0", "added_tokens": [], "model": words}).to_string();
        let tokenizer = Arc::new(Tokenizer::from_json(tokenizer.as_bytes()).unwrap());
        let guides = Guides::new(tokenizer, 1, vec![]);
        let cell = guides.kept.lock().unwrap().cell(&guide(0));
        let _compiling = cell.lock().unwrap();
        assert_eq!(guides.check(&guide(1)).unwrap_err(), "the model names no token that ends a sequence");
    }
}
