//! What a run leaves behind: its manifest, its report and its exit code.

use std::fmt::Display;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use actors::{JobOutcome, JobProgress, Pipeline, StageTimes};
use anyhow::Result;
use configs::{JobFile, Loaded};
use jobs::{
    Counts, FailedReplica, FolderLock, InputRecord, Manifest, ModelRecord, NumericProfile, Scores, Status,
    Timings, TokenTotals, Written,
};
use serde_json::json;
use stages::Model;

use crate::hindsight::BetterCut;
use crate::layout::device_names;
use crate::placement::{Placement, Source};
use crate::report::{Report, StageLine};
use crate::run::unix_seconds;
use crate::text::grouped;
use crate::{failures, interrupt, machine, print, say};

/// A job that failed and can be run again, once what stopped it is out of the way.
const EXIT_FAILED: u8 = 1;

/// A job that was stopped for its many errors, or has nothing else.
const EXIT_TOO_MANY_ERRORS: u8 = 3;

/// When a run began, and where its time went.
pub(crate) struct Running {
    pub(crate) started_at: u64,
    pub(crate) load: Duration,
    pub(crate) run: Duration,
    pub(crate) stages: Vec<StageTimes>,
}

/// A run that has come to its end, one way or another.
pub(crate) struct Ended<'a> {
    pub(crate) loaded: &'a Loaded,
    pub(crate) model: &'a Model,
    pub(crate) pipelines: &'a [Pipeline],
    pub(crate) placement: Placement,
    pub(crate) plan: serde_json::Value,
    pub(crate) numeric_profile: NumericProfile,
    pub(crate) running: Running,
    /// What became of the trace, where one was wanted.
    pub(crate) trace: Option<String>,
    pub(crate) outcome: JobOutcome,
    pub(crate) progress: Arc<JobProgress>,
    pub(crate) limit: Option<u64>,
    /// Until the manifest is there.
    pub(crate) _lock: FolderLock,
}

impl Ended<'_> {
    /// Writes the manifest, prints the report and chooses the exit code.
    pub(crate) async fn report(self) -> Result<ExitCode> {
        let (stages, better, costs) = self.stages();
        let scores = self.scores();
        let manifest = self.manifest(&stages, scores.as_ref().ok().cloned().flatten());
        let folder = &self.loaded.job.job.output;
        let has_manifest = manifest.write(folder);
        let report = self.figures(&manifest, stages, better, costs).await;
        report.lines().iter().for_each(|line| print(line));
        if let Some(failure) = &self.outcome.failure {
            // What keeps the manifest from being written is mostly what stopped the job.
            let code = stopped(failure);
            return Ok(match failure {
                actors::Error::TooManyErrors { .. } => ExitCode::from(EXIT_TOO_MANY_ERRORS),
                _ => code,
            });
        }
        if let Err(error) = has_manifest.and(scores.map(drop)) {
            return Ok(stopped(format!("{:#}", anyhow::Error::from(error))));
        }
        Ok(self.exit_code())
    }

    /// That of a run which nothing but its user has stopped.
    fn exit_code(&self) -> ExitCode {
        match self.outcome.written {
            _ if self.outcome.was_interrupted => ExitCode::from(interrupt::EXIT_CODE),
            Written { output_lines: 0, error_lines: failed @ 1.., .. } => {
                say(&format!("error: no row was answered, all {} have failed", grouped(failed)));
                say(&format!(
                    "hint: once the input is corrected, `spanwise retry {:?}` runs them again; once the job file is, `spanwise run` \
                     with --fresh starts over",
                    self.loaded.job.job.output.display()
                ));
                ExitCode::from(EXIT_TOO_MANY_ERRORS)
            }
            _ => ExitCode::SUCCESS,
        }
    }

    /// How well the rows were answered, once all are.
    fn scores(&self) -> jobs::Result<Option<Scores>> {
        let JobFile { job, grade, .. } = &self.loaded.job;
        let is_complete = self.outcome.failure.is_none() && !self.outcome.was_interrupted;
        match grade {
            Some(_) if is_complete => Ok(Some(Scores::read(&job.output)?)),
            _ => Ok(None),
        }
    }

    /// What each stage has done and should have, and the cut that would have been faster.
    fn stages(&self) -> (Vec<StageLine>, Option<BetterCut>, Source) {
        let Running { stages, .. } = &self.running;
        let (hindsight, costs) = self.placement.judge(stages);
        let collectives = |replica: usize, stage: usize| {
            let clocks = self.pipelines[replica].collective_clocks.get(stage);
            clocks.into_iter().flatten().map(|clock| clock.read()).collect()
        };
        let num_stages = self.placement.stages.len();
        let lines = (stages.iter().zip(self.placement.numbered()).enumerate())
            .map(|(index, (times, (replica, layout)))| StageLine {
                replica: (self.placement.replicas > 1).then_some(replica),
                device: device_names(&self.loaded.job.pipeline, replica, layout),
                part: layout.part,
                ranks: layout.devices.len(),
                sharing: layout.sharing.clone(),
                collectives: collectives(replica, index % num_stages),
                times: times.clone(),
                predicted: hindsight.predicted[index],
            })
            .collect();
        (lines, hindsight.better, costs)
    }

    fn manifest(&self, stages: &[StageLine], scores: Option<Scores>) -> Manifest {
        let JobFile { model, job, .. } = &self.loaded.job;
        let written = self.outcome.written;
        let count = |counter: &std::sync::atomic::AtomicU64| counter.load(Ordering::Relaxed);
        let unread = || InputRecord { path: job.input.clone(), blake3: String::new(), bytes: 0, rows: 0 };
        let input = self.outcome.input.clone().unwrap_or_else(unread);
        Manifest {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            status: match (&self.outcome.failure, self.outcome.was_interrupted) {
                (Some(_), _) => Status::Failed,
                (None, true) => Status::Interrupted,
                (None, false) => Status::Complete,
            },
            model: ModelRecord { path: model.path.clone(), identity: self.model.identity.clone() },
            counts: Counts {
                total: input.rows.max(written.output_lines + written.error_lines),
                completed: written.output_lines,
                failed: written.error_lines,
                resumed: count(&self.progress.resumed),
                stale: written.stale_lines,
            },
            input,
            limit: self.limit,
            config: self.config(),
            plan: self.plan.clone(),
            stages: stages.iter().map(StageLine::record).collect(),
            failed_replicas: (failed_replicas(&self.outcome).into_iter())
                .map(|(replica, error)| FailedReplica { replica, error })
                .collect(),
            numeric_profile: self.numeric_profile.clone(),
            tokens: TokenTotals { prompt: written.prompt_tokens, generated: written.generated_tokens },
            scores,
            timings: Timings {
                started_at: self.running.started_at,
                finished_at: unix_seconds(),
                load_seconds: self.running.load.as_secs_f64(),
                run_seconds: self.running.run.as_secs_f64(),
                scheduling_seconds: self.handling().as_secs_f64(),
                reader_cpu_seconds: count(&self.progress.reader_cpu_ns) as f64 / 1e9,
                writer_cpu_seconds: count(&self.progress.writer_cpu_ns) as f64 / 1e9,
            },
        }
    }

    /// The job file as it took effect, and what was set from outside of it.
    fn config(&self) -> serde_json::Value {
        let mut config = json!(self.loaded.job);
        config["overrides"] = json!(self.loaded.overrides);
        config
    }

    /// What the pipeline actors of all replicas took between the last stage and the first.
    fn handling(&self) -> Duration {
        self.pipelines.iter().map(|pipeline| pipeline.clock.handling()).sum()
    }

    /// What the schedulers did, those that could still be asked.
    async fn scheduler_stats(&self) -> Option<scheduler::Stats> {
        let mut all: Option<scheduler::Stats> = None;
        for pipeline in self.pipelines {
            if let Some(stats) = pipeline.scheduler_stats().await {
                *all.get_or_insert_default() += stats;
            }
        }
        all
    }

    async fn figures(
        &self,
        manifest: &Manifest,
        stages: Vec<StageLine>,
        better: Option<BetterCut>,
        costs: Source,
    ) -> Report {
        Report {
            scores: manifest.scores.clone(),
            rows_completed: manifest.counts.completed,
            rows_failed: manifest.counts.failed,
            failed: (manifest.counts.failed > 0).then(|| failures::line(&self.loaded.job.job.output)),
            rows_resumed: manifest.counts.resumed,
            stale_lines: manifest.counts.stale,
            prompt_tokens: self.progress.prompt_tokens.load(Ordering::Relaxed),
            generated_tokens: self.progress.generated_tokens.load(Ordering::Relaxed),
            load: self.running.load,
            run: self.running.run,
            handling: self.handling(),
            reader_cpu: Duration::from_nanos(self.progress.reader_cpu_ns.load(Ordering::Relaxed)),
            writer_cpu: Duration::from_nanos(self.progress.writer_cpu_ns.load(Ordering::Relaxed)),
            stages,
            costs,
            better,
            trace: self.trace.clone(),
            scheduler: self.scheduler_stats().await,
            failed_replicas: failed_replicas(&self.outcome),
            peak_bytes: machine::peak_bytes(),
            overrides: (self.loaded.overrides.iter())
                .map(|set| format!("{} = {} ({})", set.key, set.value, set.source))
                .collect(),
            output: self.loaded.job.job.output.display().to_string(),
        }
    }
}

/// Says why a job that has begun is not done. Whatever it was, it has computed rows, and can be run again.
pub(crate) fn stopped(why: impl Display) -> ExitCode {
    say(&format!("error: the job stopped: {why}"));
    say("hint: what is done is kept; the same command goes on from there");
    ExitCode::from(EXIT_FAILED)
}

/// The replicas that others went on without, and why.
fn failed_replicas(outcome: &JobOutcome) -> Vec<(usize, String)> {
    outcome.failed_replicas.iter().map(|(replica, error)| (*replica, error.to_string())).collect()
}
