//! Planted faults: the one way in which a test makes the program itself fail.
//!
//! The program passes points: each change to a file of the output folder that goes through `disk` (SQLite's
//! own writes do not), each step of a stage. A plan says what happens at which of them. Without one, which is how everybody but a test runs, a point costs the
//! look at an empty cell.
//!
//! A plan is a list, such as `seed=7,write@17:tear,stage1@1/30:panic`:
//!
//! | part | what |
//! |---|---|
//! | `write`, `stage0`, `stage1`, … | the point: a change to a file, or a step of that stage |
//! | `stage0.1`, … | a step of a rank of that stage, from 1; where stages or ranks are processes, counted in each life of one |
//! | `load0`, `load0.1`, … | that a stage or a rank that is a process is about to load, in each life of it; a rank passes it twice, first when it is about to join the others |
//! | `@17`, `@1/30` | the 17th time the point is passed, from 1; or each time with that chance, by seed |
//! | `:kill` | the process gets SIGKILL before the change |
//! | `:tear` | half of the bytes are written, then the process gets SIGKILL |
//! | `:error` | the change fails as on a full disk; after `@17` all that follow do too |
//! | `:panic`, `:hang`, `:slow` | the stage panics, stops for good, or takes 50 ms longer |
//! | `:stop` | at a point that is no change to a file: the process gets SIGSTOP |

use std::io::{self, ErrorKind, Write};
use std::str::FromStr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

/// How much longer a slow step takes: many times a step of a tiny model, and no time in a test.
const SLOW: Duration = Duration::from_millis(50);

static PLAN: OnceLock<Faults> = OnceLock::new();

/// A plan of faults.
#[derive(Debug, Clone)]
pub struct Faults {
    text: String,
    seed: u64,
    rules: Vec<Rule>,
}

#[derive(Debug, Clone)]
struct Rule {
    point: Point,
    when: When,
    action: Action,
    passed: Arc<AtomicU64>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Point {
    Write,
    Stage(usize),
    /// Of a stage, a rank beside the first.
    Rank(usize, usize),
    /// The start of a stage's process, or of that of a rank beside the first.
    Load(usize, Option<usize>),
}

#[derive(Debug, Clone, Copy)]
enum When {
    Nth(u64),
    OneIn(u64),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Action {
    Kill,
    Tear,
    Error,
    Panic,
    Hang,
    Slow,
    Stop,
}

impl Faults {
    /// Makes this the plan of the process.
    ///
    /// # Panics
    /// When there is one already.
    pub fn install(self) {
        assert!(PLAN.set(self).is_ok(), "one plan of faults per process");
    }

    fn pass(&self, point: Point) -> Option<Action> {
        // Every rule counts, so that one does not move another.
        let fires: Vec<Action> = (self.rules.iter())
            .filter(|rule| rule.point == point)
            .filter(|rule| rule.fires(self.seed))
            .map(|rule| rule.action)
            .collect();
        fires.first().copied()
    }
}

impl Rule {
    fn fires(&self, seed: u64) -> bool {
        let count = self.passed.fetch_add(1, Ordering::Relaxed) + 1;
        match self.when {
            // A disk that is full stays full.
            When::Nth(nth) if self.action == Action::Error => count >= nth,
            When::Nth(nth) => count == nth,
            When::OneIn(n) => {
                let digest = blake3::hash(format!("{seed} {:?} {count}", self.point).as_bytes());
                let bytes = digest.as_bytes().first_chunk().expect("32 bytes");
                u64::from_le_bytes(*bytes).is_multiple_of(n)
            }
        }
    }
}

impl FromStr for Faults {
    type Err = String;

    fn from_str(plan: &str) -> Result<Self, String> {
        let mut faults = Faults { text: plan.to_owned(), seed: 0, rules: Vec::new() };
        for part in plan.split(',') {
            let error = || format!("expected seed=N or POINT@WHEN:ACTION, found {part:?}");
            match part.strip_prefix("seed=") {
                Some(seed) => faults.seed = seed.parse().map_err(|_| error())?,
                None => faults.rules.push(rule(part).ok_or_else(error)?),
            }
        }
        Ok(faults)
    }
}

fn rule(text: &str) -> Option<Rule> {
    let (point, rest) = text.split_once('@')?;
    let (when, action) = rest.split_once(':')?;
    let point = named_point(point)?;
    let when = match when.strip_prefix("1/") {
        Some(n) => When::OneIn(n.parse().ok().filter(|&n| n > 0)?),
        None => When::Nth(when.parse().ok()?),
    };
    let action = match (point, action) {
        (_, "kill") => Action::Kill,
        (Point::Write, "tear") => Action::Tear,
        (Point::Write, "error") => Action::Error,
        (Point::Write, _) => return None,
        (_, "panic") => Action::Panic,
        (_, "hang") => Action::Hang,
        (_, "slow") => Action::Slow,
        (_, "stop") => Action::Stop,
        _ => return None,
    };
    Some(Rule { point, when, action, passed: Arc::default() })
}

fn named_point(name: &str) -> Option<Point> {
    if let Some(of) = name.strip_prefix("load") {
        let (stage, rank) = place(of)?;
        return Some(Point::Load(stage, rank));
    }
    match name.strip_prefix("stage") {
        Some(of) => Some(match place(of)? {
            (stage, Some(rank)) => Point::Rank(stage, rank),
            (stage, None) => Point::Stage(stage),
        }),
        None => (name == "write").then_some(Point::Write),
    }
}

/// A stage, and the rank of it that is named, if one is.
fn place(text: &str) -> Option<(usize, Option<usize>)> {
    match text.split_once('.') {
        Some((stage, rank)) => Some((stage.parse().ok()?, Some(rank.parse().ok()?))),
        None => Some((text.parse().ok()?, None)),
    }
}

/// A stage is about to take a step.
///
/// # Panics
/// Where that is planned.
pub fn step(stage: usize) {
    take(Point::Stage(stage));
}

/// A rank of a stage, from 1, is about to take a step.
///
/// # Panics
/// Where that is planned.
pub fn rank_step(stage: usize, rank: usize) {
    take(Point::Rank(stage, rank));
}

/// The process of a stage, or of a rank of it, from 1, goes on with its start.
///
/// # Panics
/// Where that is planned.
pub fn load(stage: usize, rank: Option<usize>) {
    take(Point::Load(stage, rank));
}

/// The plan of this process, for another that it starts.
pub fn plan() -> Option<String> {
    PLAN.get().map(|plan| plan.text.clone())
}

fn take(point: Point) {
    match PLAN.get().and_then(|plan| plan.pass(point)) {
        Some(Action::Panic) => panic!("a planted panic"),
        Some(Action::Hang) => loop {
            std::thread::park();
        },
        Some(Action::Slow) => std::thread::sleep(SLOW),
        Some(Action::Stop) => stop(),
        Some(_) => kill(),
        None => {}
    }
}

/// A file of the output folder is about to be changed other than by writing to it.
pub(crate) fn change() -> io::Result<()> {
    match PLAN.get().and_then(|plan| plan.pass(Point::Write)) {
        Some(Action::Error) => Err(full()),
        Some(_) => kill(),
        None => Ok(()),
    }
}

/// A file of the output folder, whose every write is a point.
#[derive(Debug)]
pub(crate) struct Planted<W>(pub(crate) W);

impl<W: Write> Write for Planted<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match PLAN.get().and_then(|plan| plan.pass(Point::Write)) {
            Some(Action::Error) => Err(full()),
            Some(Action::Tear) => {
                self.0.write_all(&bytes[..bytes.len() / 2])?;
                kill()
            }
            Some(_) => kill(),
            None => self.0.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

fn full() -> io::Error {
    io::Error::new(ErrorKind::StorageFull, "a planted full disk")
}

/// Stops the process until somebody has it go on.
fn stop() {
    let _ = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::STOP);
}

/// Ends the process as a power cut would: nothing of it runs any more.
fn kill() -> ! {
    let _ = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
    loop {
        std::thread::park();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plan_says_what_happens_when() {
        let plan: Faults = "seed=7,write@2:tear,stage1@1/4:panic,write@4:error".parse().unwrap();
        let writes: Vec<_> = (0..6).map(|_| plan.pass(Point::Write)).collect();
        let (tear, error) = (Some(Action::Tear), Some(Action::Error));
        assert_eq!(writes, [None, tear, None, error, error, error]);
        assert!((0..100).all(|_| plan.pass(Point::Stage(0)).is_none()));
        let panics = (0..1000).filter(|_| plan.pass(Point::Stage(1)).is_some()).count();
        assert!((200..300).contains(&panics), "{panics} of 1000, expected about a quarter");
        let plan: Faults = "load1@1:kill,load1.2@2:stop".parse().unwrap();
        assert_eq!(plan.pass(Point::Load(1, None)), Some(Action::Kill));
        assert!(plan.pass(Point::Load(1, Some(1))).is_none());
        let of_rank: Vec<_> = (0..3).map(|_| plan.pass(Point::Load(1, Some(2)))).collect();
        assert_eq!(of_rank, [None, Some(Action::Stop), None]);
    }

    #[test]
    fn a_plan_that_makes_no_sense_is_refused() {
        for plan in [
            "",
            "write",
            "write@2",
            "write@2:panic",
            "write@2:stop",
            "load@1:kill",
            "stage@1:panic",
            "stage0@1/0:panic",
            "seed=x",
        ] {
            assert!(plan.parse::<Faults>().is_err(), "{plan:?}");
        }
    }
}
