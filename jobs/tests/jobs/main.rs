//! A job's files from outside: rows to requests, completions to lines, lines to files.

mod detokenizer;
mod guides;
mod journal;
mod lines;
mod model;
mod refusals;
mod rows;
mod stops;
mod templates;
mod view;
mod writer;
