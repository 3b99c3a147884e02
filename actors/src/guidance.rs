//! Masks for rows whose answers follow a guide, made on threads of their own while stages compute.
//!
//! A sequence has one mask under way at a time: its next token is drawn with it. So work of one sequence is done in order,
//! whichever thread does it.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex};

use crossbeam::channel::{Sender, unbounded};
use jobs::{Follower, Guides};
use scheduler::{Guide, TokenId, TokenMask};

use crate::error::panic_message;
use crate::thread::{lock, spawn};

/// Threads that make masks. Most take some tens of microseconds, and a step takes thousands for its rows.
fn num_threads() -> usize {
    let cores = std::thread::available_parallelism().map_or(1, |cores| cores.get());
    (cores / 4).clamp(1, 8)
}

/// The threads; they end with it.
pub(crate) struct MaskMakers {
    /// No more are under way than there are sequences.
    work: Sender<Work>,
}

/// One mask to be made.
struct Work {
    walk: Arc<Mutex<Walk>>,
    tokens: Vec<TokenId>,
    mask: TokenMask,
}

/// How far an answer has come in its guide.
enum Walk {
    /// Not begun.
    New(Guiding),
    /// On its way.
    Going(Box<Follower>),
    /// It has no more masks.
    Ended,
}

/// What guides an answer.
pub(crate) struct Guiding {
    pub(crate) guides: Arc<Guides>,
    pub(crate) guide: Guide,
}

/// The guide of one sequence.
pub(crate) struct Guided {
    walk: Arc<Mutex<Walk>>,
    /// For the next token.
    mask: TokenMask,
}

impl MaskMakers {
    pub(crate) fn start() -> MaskMakers {
        let (work, queue) = unbounded::<Work>();
        for index in 0..num_threads() {
            let queue = queue.clone();
            spawn(format!("masks-{index}"), move || queue.into_iter().for_each(Work::run));
        }
        MaskMakers { work }
    }

    /// Guides a sequence that has these tokens.
    pub(crate) fn guide(&self, guiding: Guiding, so_far: &[TokenId]) -> Guided {
        let walk = Arc::new(Mutex::new(Walk::New(guiding)));
        let mask = self.make(&walk, so_far.to_vec());
        Guided { walk, mask }
    }

    /// Goes on by a token.
    pub(crate) fn take(&self, guided: &mut Guided, token: TokenId) {
        guided.mask = self.make(&guided.walk, vec![token]);
    }

    fn make(&self, walk: &Arc<Mutex<Walk>>, tokens: Vec<TokenId>) -> TokenMask {
        let mask = TokenMask::default();
        let work = Work { walk: Arc::clone(walk), tokens, mask: mask.clone() };
        self.work.send(work).expect("the threads live as long as this");
        mask
    }
}

impl Guided {
    /// The mask for its next token.
    pub(crate) fn mask(&self) -> TokenMask {
        self.mask.clone()
    }
}

impl Work {
    fn run(self) {
        let mut walk = lock(&self.walk);
        // Whoever draws waits for a mask, whatever becomes of it here.
        let gone = catch_unwind(AssertUnwindSafe(|| walk.go(&self.tokens)));
        let words = match gone.unwrap_or_else(|panic| Err(panic_message(&*panic))) {
            Ok(words) => Some(words),
            Err(message) => {
                tracing::warn!("a guide gives up: {message}");
                *walk = Walk::Ended;
                None
            }
        };
        self.mask.set(words);
    }
}

impl Walk {
    fn go(&mut self, tokens: &[TokenId]) -> Result<Vec<u32>, String> {
        if let Walk::New(Guiding { guides, guide }) = self {
            *self = Walk::Going(Box::new(guides.follow(guide)?));
        }
        let Walk::Going(follower) = self else { return Err("it has given up before".to_owned()) };
        follower.take(tokens)?;
        follower.mask()
    }
}
