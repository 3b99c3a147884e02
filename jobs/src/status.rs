//! How far a job is, as one sees it from outside: from its journal, its lock and its manifest.

use std::path::Path;

use crate::error::Result;
use crate::folder;
use crate::journal::{JournalView, Progress};
use crate::manifest::{Manifest, Status};

/// A job at one moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JobStatus {
    /// Whether somebody works on it, or how it ended.
    pub phase: JobPhase,
    /// How far it was at its last commit.
    pub progress: Progress,
}

/// Whether a job runs, or how it ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum JobPhase {
    /// A run works on it.
    Running {
        /// Who it is.
        holder: String,
    },
    /// Its last run has come to an end, and said how.
    Ended(Status),
    /// Its last run was killed.
    Died,
}

impl JobStatus {
    /// Looks at the job of an output folder, and changes nothing.
    ///
    /// # Errors
    /// A folder without a job.
    pub fn of(folder: &Path) -> Result<JobStatus> {
        // First who runs: a run that ends meanwhile has written its manifest by then.
        let holder = folder::at_work(folder)?;
        let view = JournalView::of_job(folder)?;
        let phase = match holder {
            Some(holder) => JobPhase::Running { holder },
            None if !folder.join(Manifest::FILE_NAME).exists() => JobPhase::Died,
            None => JobPhase::Ended(Manifest::read(folder)?.status),
        };
        Ok(JobStatus { phase, progress: view.progress()? })
    }

    /// Lines of rows that the latest run need not look at, or not any more.
    pub fn lines(&self) -> u64 {
        let Progress { output_lines, error_lines, pending_lines, .. } = self.progress;
        output_lines + error_lines - pending_lines
    }

    /// Error lines of rows that the run at work is to look at again and has not yet: they may get another line.
    pub fn lines_to_renew(&self) -> u64 {
        if self.is_running() { self.progress.pending_lines } else { 0 }
    }

    /// The share of the input's bytes that was read, where that is known: a pipe has no size.
    pub fn share_read(&self) -> Option<f64> {
        let Progress { is_read_to_end, bytes_read, input_bytes, .. } = self.progress;
        match (is_read_to_end, input_bytes) {
            (true, _) => Some(1.0),
            (false, 0) => None,
            (false, size) => Some((bytes_read as f64 / size as f64).min(1.0)),
        }
    }

    /// Rows of the input: all of them once it is read, else as many as its size lets expect.
    pub fn rows(&self) -> Option<u64> {
        let read = self.progress.rows_read;
        match self.share_read() {
            Some(1.0) => Some(read),
            Some(share) if share > 0.0 => Some((read as f64 / share).round() as u64),
            _ => None,
        }
    }

    /// Seconds of the latest run, up to its last commit.
    pub fn seconds(&self) -> f64 {
        self.progress.committed.saturating_sub(self.progress.began) as f64
    }

    /// Lines a second of the latest run.
    pub fn lines_per_second(&self) -> Option<f64> {
        let lines = self.lines().saturating_sub(self.progress.earlier_lines);
        (self.seconds() > 0.0).then(|| lines as f64 / self.seconds())
    }

    /// Generated tokens a second of the latest run.
    pub fn tokens_per_second(&self) -> Option<f64> {
        let Progress { generated_tokens, unfinished_tokens, earlier_generated_tokens, .. } = self.progress;
        let tokens = (generated_tokens + unfinished_tokens).saturating_sub(earlier_generated_tokens);
        (self.seconds() > 0.0).then(|| tokens as f64 / self.seconds())
    }

    /// Seconds until the last line of a running job, as far as they can be told.
    pub fn seconds_left(&self) -> Option<f64> {
        let left = self.rows()?.saturating_sub(self.lines());
        self.lines_per_second().filter(|rate| self.is_running() && *rate > 0.0).map(|rate| left as f64 / rate)
    }

    fn is_running(&self) -> bool {
        matches!(self.phase, JobPhase::Running { .. })
    }
}

#[cfg(test)]
mod tests {
    use scheduler::RequestKey;

    use super::*;
    use crate::line::Line;
    use crate::{LineFile, Order, OutputFolder, Settings, Unread};

    fn status(progress: Progress) -> JobStatus {
        JobStatus { phase: JobPhase::Running { holder: "process 1".to_owned() }, progress }
    }

    #[test]
    fn the_time_left_follows_from_the_share_read_and_the_rate_of_this_run() {
        let half_way = Progress {
            began: 1_000,
            committed: 1_100,
            earlier_lines: 100,
            pending_lines: 0,
            earlier_generated_tokens: 500,
            rows_read: 400,
            bytes_read: 5_000,
            input_bytes: 10_000,
            is_read_to_end: false,
            output_lines: 290,
            error_lines: 10,
            prompt_tokens: 9_000,
            generated_tokens: 2_400,
            unfinished_tokens: 100,
        };
        let job = status(half_way);
        assert_eq!((job.share_read(), job.rows(), job.lines()), (Some(0.5), Some(800), 300));
        assert_eq!((job.lines_per_second(), job.tokens_per_second()), (Some(2.0), Some(20.0)));
        assert_eq!(job.seconds_left(), Some(250.0));

        let all_read = status(Progress { is_read_to_end: true, ..half_way });
        assert_eq!((all_read.rows(), all_read.seconds_left()), (Some(400), Some(50.0)));
        let pipe = status(Progress { input_bytes: 0, ..half_way });
        assert_eq!((pipe.share_read(), pipe.rows(), pipe.seconds_left()), (None, None, None));
        let began = status(Progress { committed: 1_000, ..half_way });
        assert_eq!((began.lines_per_second(), began.seconds_left()), (None, None));
    }

    #[test]
    fn rows_that_are_retried_are_left_until_they_have_another_line() {
        let (folder, order) = (tempfile::tempdir().unwrap(), Order::Input);
        let open = || OutputFolder::open(folder.path(), false).unwrap();
        let begin = |folder: OutputFolder| folder.begin(order, &Settings::default(), 1, false).unwrap().0;
        let line = |row: u64, file| Line {
            row,
            key: RequestKey(row.into()),
            file,
            is_refusal: false,
            prompt_tokens: 0,
            generated_tokens: 0,
            json: "{}".to_owned(),
        };
        let mut writer = begin(open());
        for (row, file) in [(0, LineFile::Output), (1, LineFile::Errors), (2, LineFile::Errors)] {
            writer.write(&line(row, file)).unwrap();
        }
        writer.finish(Unread::HasLeft).unwrap();
        assert_eq!(open().finished_rows().unwrap(), 3);
        assert_eq!(open().for_retry().finished_rows().unwrap(), 1);

        let mut writer = begin(open().for_retry());
        let now = || {
            let job = JobStatus::of(folder.path()).unwrap();
            (job.lines(), job.lines_to_renew(), job.progress.error_lines, job.progress.earlier_lines)
        };
        assert_eq!(now(), (1, 2, 2, 1));
        writer.write(&line(1, LineFile::Errors)).unwrap();
        writer.commit().unwrap();
        assert_eq!(now(), (2, 1, 2, 1));
        // It takes 100 s for a row and has one left of three.
        let progress = JobStatus::of(folder.path()).unwrap().progress;
        let job =
            status(Progress { began: 0, committed: 100, rows_read: 3, is_read_to_end: true, ..progress });
        assert_eq!((job.lines_per_second(), job.seconds_left()), (Some(0.01), Some(100.0)));

        // Who goes on after a retry that was stopped has row 2 to compute.
        writer.pause().unwrap();
        assert_eq!(now(), (2, 0, 2, 1));
        assert_eq!(open().finished_rows().unwrap(), 2);
        let mut writer = begin(open());
        assert_eq!(now(), (2, 1, 2, 2));
        writer.write(&line(2, LineFile::Output)).unwrap();
        writer.commit().unwrap();
        assert_eq!(now(), (3, 0, 1, 2));
    }
}
