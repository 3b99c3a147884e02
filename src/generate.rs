//! `spanwise generate`: one prompt, answered on the terminal as it is generated.

use std::io::Write;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context, Result, anyhow, bail};
use jobs::{Message, Preparer, Prompt, RowOptions, SamplingOptions, StopMatcher, Tokenizer, Transcript};
use scheduler::{FinishReason, Sampling, Span, TokenId};
use stages::Model;
use tokio::sync::mpsc::{self, UnboundedReceiver};

use crate::cli::GenerateArgs;
use crate::interrupt::{self, Interrupt};
use crate::{lower, machine, run, say};

/// Answers one prompt.
///
/// # Errors
/// A model that cannot be loaded, a prompt that cannot be answered.
pub(crate) async fn generate(args: GenerateArgs) -> Result<ExitCode> {
    if args.model.is_file() {
        bail!(
            "{} is a file, expected a model's folder\nhint: `spanwise run JOB.toml` runs a job file",
            args.model.display()
        );
    }
    let interrupt = Interrupt::listen()?;
    let files = configs::Model {
        path: args.model.clone(),
        dtype: args.dtype.into(),
        max_context_tokens: args.max_context_tokens,
        ..configs::Model::default()
    };
    let settings = configs::Pipeline {
        threads: args.threads,
        max_sequences: configs::AutoCount::Given(1),
        ..configs::Pipeline::default()
    };
    let (model, warnings) = Model::open(&files.path, files.random_weights).context("load model")?;
    warnings.0.iter().for_each(|warning| say(&format!("warning: {warning}")));
    let whole = Span { start: 0, end: model.config.blocks.len() };
    let replicas = lower::pipeline(&files, &settings, &model.config, &machine::detect())?.with(&[
        crate::layout::StageLayout { part: whole.into(), devices: 0..1, sharing: stages::Sharing::default() },
    ])?;
    let options = replicas.into_iter().next().expect("there is one");

    let text = run::open_text(&files, &model.config, run::unix_seconds())?;
    let tokenizer = text.tokenizer().cloned().ok_or_else(|| {
        anyhow!("{} has no tokenizer.json; a job may send token ids: see spanwise run", files.path.display())
    })?;
    let row_options = RowOptions {
        model_identity: model.identity.clone(),
        prompt: None,
        grader: None,
        sampling: SamplingOptions::default(),
        seed: 0,
        max_context_tokens: u32::try_from(options.scheduler.context_tokens)
            .context("the context is too long")?,
    };
    let row = Preparer::new(text, row_options)?.prompt(prompt(&args), sampling(args))?;
    options.scheduler.check(&row.request)?;

    let answered = async {
        let pipeline = actors::start(&model, options).await?;
        let sampling = &row.request.sampling;
        let stop = (!sampling.stop.is_empty()).then(|| StopMatcher::new(Arc::clone(&tokenizer), sampling));
        let (tokens, drawn) = mpsc::unbounded_channel();
        let answer = actors::answer(&pipeline, Arc::clone(&row.request), stop, tokens);
        let (answer, ()) = tokio::join!(answer, print_as_drawn(drawn, &tokenizer, sampling));
        anyhow::Ok(answer?)
    };
    let completion = tokio::select! {
        completion = answered => completion?,
        () = interrupt.wait() => return Ok(ExitCode::from(interrupt::EXIT_CODE)),
    };
    if completion.outcome.map_err(|failure| anyhow!(failure))? == FinishReason::Length {
        say(&format!("(ended after {} tokens, its limit)", completion.generated.tokens.len()));
    }
    Ok(ExitCode::SUCCESS)
}

fn prompt(args: &GenerateArgs) -> Prompt {
    if args.raw {
        return Prompt::Text(args.prompt.clone());
    }
    let system = args.system.iter().map(|text| Message::new("system", text));
    Prompt::Chat(system.chain([Message::new("user", &args.prompt)]).collect())
}

fn sampling(args: GenerateArgs) -> SamplingOptions {
    SamplingOptions {
        temperature: args.temperature,
        top_p: args.top_p,
        top_k: args.top_k.map(i64::from),
        min_p: args.min_p,
        repetition_penalty: args.repetition_penalty,
        frequency_penalty: args.frequency_penalty,
        presence_penalty: args.presence_penalty,
        seed: args.seed,
        max_tokens: args.max_tokens,
        stop: Some(args.stop).filter(|stop| !stop.is_empty()),
        ..SamplingOptions::default()
    }
}

/// Prints text as soon as no stop string can take it back.
async fn print_as_drawn(
    mut drawn: UnboundedReceiver<TokenId>,
    tokenizer: &Arc<Tokenizer>,
    sampling: &Sampling,
) {
    let mut transcript = Transcript::new(Arc::clone(tokenizer), sampling);
    while let Some(token) = drawn.recv().await {
        if !sampling.stop_token_ids.contains(&token) {
            transcript.push(token);
        }
        print_now(transcript.take_settled());
    }
    print_now(&transcript.finish_settled());
    print_now("\n");
}

/// Prints without waiting for the end of the line. Who closed the pipe wants no more.
fn print_now(text: &str) {
    let mut out = std::io::stdout().lock();
    let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
}
