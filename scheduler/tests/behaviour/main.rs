//! The scheduler as its callers see it: scripted events, seeded events, and the world they happen in.

mod lanes;
mod scripted;
mod seeded;
mod world;
