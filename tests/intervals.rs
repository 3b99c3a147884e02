//! The interval that benches print beside a median.
#![forbid(unsafe_code)]

#[path = "../benches/common/interval.rs"]
mod interval;

use interval::Interval;

#[test]
fn of_nine_values_the_second_and_the_eighth_hold_the_median() {
    let interval = Interval::of(&[9.0, 1.0, 8.0, 2.0, 7.0, 3.0, 6.0, 4.0, 5.0]);
    // No value or one below, or above: 2 · (1 + 9) of 2⁹ ways.
    assert_eq!((interval.low, interval.high, interval.confidence), (2.0, 8.0, 1.0 - 20.0 / 512.0));
    assert_eq!(format!("{interval:.1}"), "2.0 to 8.0 with 96 % (values 2 and 8 of 9)");
}

#[test]
fn few_values_hold_it_as_far_as_they_do() {
    let of = |values: &[f64]| Interval::of(values).to_string();
    assert_eq!(of(&[0.9, 1.1, 1.0]), "0.900 to 1.100 with 75 % (values 1 and 3 of 3)");
    assert_eq!(of(&[0.9]), "0.900 to 0.900 with 0 % (values 1 and 1 of 1)");
}

#[test]
fn many_values_make_it_narrow() {
    let values: Vec<f64> = (1..=100).map(f64::from).collect();
    let interval = Interval::of(&values);
    // As tables of the sign test have it: the 40th and the 61st.
    assert_eq!((interval.low, interval.high), (40.0, 61.0));
    assert!((0.95..0.97).contains(&interval.confidence), "{interval:?}");
}
