//! Answers that are waited for later, and tokens that a step draws and the next one begins with.

use kernels::{Choice, ChoiceScratch, Drawn, Draws, Edit, Edits, FedTokens, RowEdits};

use crate::battery::device::{Check, Device, Readable, bits, every_weight_device};
use crate::battery::random::Random;

const VOCABULARY: usize = 200;
const HIDDEN: usize = 64;
const GREEDY: Choice =
    Choice { given: None, temperature: 0.0, top_k: 0, top_p: 1.0, min_p: 0.0, uniform: 0, top: 0 };

pub(crate) struct Ahead;

/// What a step asks for: rows that are chosen from, one of them edited, and rows of which the largest logit is enough.
struct Asked {
    logits: Vec<f32>,
    choices: Vec<Choice>,
    edits: Edits,
    x: Vec<f32>,
}

impl Asked {
    /// The third row that is chosen from is not finite.
    fn new(random: &mut Random, step: u64) -> Asked {
        let mut logits = random.values(5 * VOCABULARY);
        logits[2 * VOCABULARY + 7] = f32::NAN;
        let uniform = step.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let drawn = Choice { temperature: 0.9, uniform, ..GREEDY };
        // More tokens are named in a later step than anybody makes room for.
        let top = if step == 3 { VOCABULARY as u32 } else { 3 };
        let choices = vec![drawn, Choice { top, ..GREEDY }, drawn, Choice { top_p: 0.5, ..drawn }, drawn];
        let mut edits = Edits::default();
        let barred: Vec<Edit> = (0..VOCABULARY as u32)
            .filter(|token| token % 7 != 0)
            .map(|token| Edit { token, scale: 1.0, shift: f32::NEG_INFINITY })
            .collect();
        (0..4).for_each(|_| edits.add_row(RowEdits::default()));
        edits.add_row(RowEdits { edits: &barred, mask: None });
        Asked { logits, choices, edits, x: random.values(4 * HIDDEN) }
    }

    fn queue<B: Readable>(&self, device: &Device<B>, w: &B::Matrix, draws: &mut Draws) {
        let Asked { logits, choices, edits, x } = self;
        let (backend, scratch) = (&device.backend, &mut ChoiceScratch::default());
        backend.open_draws(draws, 9).unwrap();
        let mut logits = device.array(logits, VOCABULARY);
        backend.choose_into(&mut logits, choices, edits, scratch, draws).unwrap();
        let (x, _) = device.operand(x, HIDDEN);
        backend.matmul_argmax_into(&x, w, &mut backend.array(), draws).unwrap();
    }

    /// The same, waited for at once.
    fn now<B: Readable>(&self, device: &Device<B>, w: &B::Matrix) -> Vec<Drawn> {
        let Asked { logits, choices, edits, x } = self;
        let (mut chosen, mut largest) = (Vec::new(), Vec::new());
        let mut logits = device.array(logits, VOCABULARY);
        let scratch = &mut ChoiceScratch::default();
        device.backend.choose(&mut logits, choices, edits, scratch, &mut chosen).unwrap();
        let (x, _) = device.operand(x, HIDDEN);
        device.backend.matmul_argmax(&x, w, &mut device.backend.array(), &mut largest).unwrap();
        chosen.into_iter().map(Drawn::Chosen).chain(largest.into_iter().map(Drawn::Largest)).collect()
    }
}

/// All bits, which `==` does not see of a NaN.
fn text(drawn: &[Drawn]) -> Vec<String> {
    drawn.iter().map(|drawn| format!("{drawn:?}")).collect()
}

impl Check for Ahead {
    fn check<B: Readable>(&self, device: &Device<B>) {
        let (backend, name) = (&device.backend, device.name());
        let mut random = Random::new(12);
        let table = random.values(VOCABULARY * HIDDEN);
        let (w, table) =
            (device.matrix(&table, VOCABULARY, HIDDEN), device.table(&table, VOCABULARY, HIDDEN));
        let asked: Vec<Asked> = (0..6).map(|step| Asked::new(&mut random, step)).collect();
        let expected: Vec<Vec<Drawn>> = asked.iter().map(|asked| asked.now(device, &w)).collect();
        // Each step is queued before the answers to the one before are read, and those lie in the place of the one before that.
        let mut draws = [backend.draws(9).unwrap(), backend.draws(4).unwrap()];
        let mut embedded = Vec::new();
        for (step, asked) in asked.iter().enumerate() {
            let [first, second] = &mut draws;
            let (before, own) = if step % 2 == 0 { (first, second) } else { (second, first) };
            if step > 0 {
                let mut out = backend.array();
                let tokens: Vec<u32> = (0..9).map(|row| row * 11 % VOCABULARY as u32).collect();
                // All but the last row, and each answer at another row than its own. The third is of a row that has none.
                let fed: Vec<(u32, u32)> = (0..8).map(|row| (row, (row * 5 + 1) % 9)).collect();
                backend
                    .embed_fed(&table, FedTokens { tokens: &tokens, fed: &fed, draws: before }, &mut out)
                    .unwrap();
                embedded.push((tokens, fed, out));
            }
            asked.queue(device, &w, own);
            let arrival = backend.close_draws(own).unwrap();
            if step > 0 {
                assert_eq!(
                    text(backend.read_draws(before).unwrap()),
                    text(&expected[step - 1]),
                    "{name} step {step}"
                );
            }
            if step + 1 == expected.len() {
                std::thread::spawn(move || arrival.wait().unwrap()).join().unwrap();
                assert_eq!(
                    text(backend.read_draws(own).unwrap()),
                    text(&expected[step]),
                    "{name}: the last step"
                );
            }
        }
        for (step, (mut tokens, fed, found)) in embedded.into_iter().enumerate() {
            for (row, place) in fed {
                if let Some(token) = expected[step][place as usize].token() {
                    tokens[row as usize] = token;
                } else {
                    assert_eq!(place, 2, "{name}: a row that is not finite has no token");
                    tokens[row as usize] = 0;
                }
            }
            let mut out = backend.array();
            backend.embed(&table, &tokens, &mut out).unwrap();
            assert_eq!(bits(&device.values(&found)), bits(&device.values(&out)), "{name} step {step}");
        }
    }
}

#[test]
fn a_step_begins_with_the_tokens_of_the_one_before_while_its_answers_are_on_their_way() {
    every_weight_device(&Ahead);
}
