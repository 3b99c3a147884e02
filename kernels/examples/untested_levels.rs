//! Says at which SIMD levels this processor cannot run the kernels' tests, which leave those out.

use kernels::Simd;

#[expect(clippy::print_stdout, reason = "what it is for")]
fn main() {
    let lacking: Vec<&str> =
        Simd::ALL.into_iter().filter(|level| !level.is_available()).map(Simd::name).collect();
    match lacking.join(", ") {
        none if none.is_empty() => println!("tested at every simd level"),
        some => println!("not tested on this processor: {some}"),
    }
}
