//! A cost as a function of one number, known at some points.

/// Where a cost comes from, the surest first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Basis {
    /// Measured at this very point.
    Measured,
    /// Between two points that were.
    Interpolated,
    /// Beyond all points that were.
    Extrapolated,
    /// A share of what was measured for a whole block on one device, by its weights.
    Scaled,
}

impl Basis {
    /// The word for it in messages.
    pub fn name(self) -> &'static str {
        match self {
            Self::Measured => "measured",
            Self::Interpolated => "interpolated",
            Self::Extrapolated => "extrapolated",
            Self::Scaled => "scaled",
        }
    }
}

/// Points that straight lines join. Before the first it is what it is there, as a device takes no less for fewer tokens
/// than for one; after the last it goes on as between the last two.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Curve {
    points: Vec<(f64, f64)>,
}

impl Curve {
    /// Of points in rising order, at least one.
    pub(super) fn new(points: impl IntoIterator<Item = (f64, f64)>) -> Self {
        let points: Vec<_> = points.into_iter().collect();
        assert!(points.is_sorted_by(|a, b| a.0 < b.0) && !points.is_empty(), "no curve: {points:?}");
        Curve { points }
    }

    pub(super) fn at(&self, x: f64) -> f64 {
        let points = &self.points;
        let after = points.partition_point(|point| point.0 < x);
        let (first, last) = (points[0], points[points.len() - 1]);
        if after == 0 || points.len() == 1 {
            return if x > last.0 { last.1 * x / last.0 } else { first.1 };
        }
        let after = after.min(points.len() - 1);
        let ((x0, y0), (x1, y1)) = (points[after - 1], points[after]);
        // Noise may let the last two fall: what is more takes no less.
        let slope = if x > x1 { ((y1 - y0) / (x1 - x0)).max(0.0) } else { (y1 - y0) / (x1 - x0) };
        y1 + (x - x1) * slope
    }

    pub(super) fn basis(&self, x: f64) -> Basis {
        let (first, last) = (self.points[0], self.points[self.points.len() - 1]);
        if self.points.iter().any(|point| point.0 == x) {
            Basis::Measured
        } else if x < first.0 || x > last.0 {
            Basis::Extrapolated
        } else {
            Basis::Interpolated
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_curve_is_exact_at_its_points_and_rises_between_rising_ones() {
        let points = [(1.0, 3.0), (2.0, 3.5), (4.0, 4.0), (8.0, 9.0)];
        let curve = Curve::new(points);
        for (x, y) in points {
            assert_eq!((curve.at(x), curve.basis(x)), (y, Basis::Measured));
        }
        let walk: Vec<f64> = (10..=80).map(|tenth| curve.at(f64::from(tenth) / 10.0)).collect();
        assert!(walk.is_sorted(), "{walk:?}");
        assert_eq!((curve.at(6.0), curve.basis(6.0)), (6.5, Basis::Interpolated));
    }

    #[test]
    fn beyond_its_points_a_curve_goes_on_and_before_them_it_stays() {
        let curve = Curve::new([(2.0, 1.0), (4.0, 2.0)]);
        assert_eq!((curve.at(1.0), curve.basis(1.0)), (1.0, Basis::Extrapolated));
        assert_eq!((curve.at(8.0), curve.basis(8.0)), (4.0, Basis::Extrapolated));
        assert_eq!(Curve::new([(2.0, 1.0), (4.0, 0.5)]).at(8.0), 0.5);
        assert_eq!(Curve::new([(2.0, 1.0)]).at(8.0), 4.0);
    }
}
