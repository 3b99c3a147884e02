//! Values of bins as outlines: a level for each bin, and steps between them.
//!
//! Levels are rounded to half a pixel, and neighbours that are then alike are one step: so a picture of 64 stages
//! stays small, and what is drawn is never further from its value than a quarter of a pixel. Numbers in a path
//! are relative to the last point; they are counted in whole tenths of a pixel, so that nothing adds up to a drift.

use std::fmt::Write;

/// Half a pixel, in tenths.
const LEVEL: f64 = 5.0;

/// Where bins begin and end on the page.
#[derive(Debug)]
pub(super) struct Bins {
    /// One more than there are bins, in tenths of a pixel.
    edges: Vec<i64>,
}

impl Bins {
    /// As many bins of `bin_seconds` as `num_bins`, from `x` on at so many pixels for a second; the last one ends at
    /// `end_seconds`.
    pub(super) fn new(x: f64, scale: f64, num_bins: usize, bin_seconds: f64, end_seconds: f64) -> Self {
        let edge = |bin: usize| tenths(x + (bin as f64 * bin_seconds).min(end_seconds) * scale);
        Bins { edges: (0..=num_bins).map(edge).collect() }
    }

    /// The outline of all that is beneath `heights`, one for each bin, down to `bottom`.
    pub(super) fn area(&self, bottom: f64, heights: impl Iterator<Item = f64>) -> String {
        let mut path = format!("M{} {}", Tenths(self.edges[0]), Tenths(tenths(bottom)));
        let mut last = 0;
        for (width, level) in self.steps(heights) {
            write_step(&mut path, level - last, width);
            last = level;
        }
        path.push_str(&format!("v{}z", Tenths(last)));
        path
    }

    /// The line along `heights` above `bottom`.
    pub(super) fn line(&self, bottom: f64, heights: impl Iterator<Item = f64>) -> String {
        let steps = self.steps(heights);
        let mut last = steps.first().map_or(0, |(_, level)| *level);
        let mut path = format!("M{} {}", Tenths(self.edges[0]), Tenths(tenths(bottom) - last));
        for (width, level) in steps {
            write_step(&mut path, level - last, width);
            last = level;
        }
        path
    }

    /// Width and height of each step.
    fn steps(&self, heights: impl Iterator<Item = f64>) -> Vec<(i64, i64)> {
        let mut steps: Vec<(i64, i64)> = vec![];
        for (edges, height) in self.edges.windows(2).zip(heights) {
            let width = edges[1] - edges[0];
            let level = (height * 10.0 / LEVEL).round() as i64 * LEVEL as i64;
            match steps.last_mut() {
                Some((last_width, last)) if *last == level => *last_width += width,
                _ => steps.push((width, level)),
            }
        }
        steps
    }
}

/// Up by `rise`, then on by `width`.
fn write_step(path: &mut String, rise: i64, width: i64) {
    if rise != 0 {
        let _ = write!(path, "v{}", Tenths(-rise));
    }
    let _ = write!(path, "h{}", Tenths(width));
}

fn tenths(pixels: f64) -> i64 {
    (pixels * 10.0).round() as i64
}

/// A length as pixels.
struct Tenths(i64);

impl std::fmt::Display for Tenths {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // Display leaves out a fraction of nought.
        write!(f, "{}", self.0 as f64 / 10.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_of_equal_level_are_one_step() {
        let bins = Bins::new(100.0, 10.0, 4, 1.0, 3.5);
        assert_eq!(bins.area(50.0, [4.1, 3.9, 0.0, 2.5].into_iter()), "M100 50v-4h20v4h10v-2.5h5v2.5z");
        assert_eq!(bins.line(50.0, [4.1, 3.9, 0.0, 2.5].into_iter()), "M100 46h20v4h10v-2.5h5");
    }

    #[test]
    fn widths_that_are_no_whole_pixels_do_not_drift() {
        let bins = Bins::new(0.0, 3.33, 256, 1.0, 256.0);
        let line = bins.line(9.0, (0..256).map(|bin| f64::from(bin % 2)));
        let widths = line.split('h').skip(1).map(|rest| rest.split('v').next().unwrap());
        let sum: f64 = widths.map(|width| width.parse::<f64>().unwrap()).sum();
        assert!((sum - 256.0 * 3.33).abs() < 0.06, "{sum}");
    }
}
