#![no_main]

libfuzzer_sys::fuzz_target!(
    init: {
        // A panic of the template library is caught where it is called; one that is not still ends the run.
        drop(std::panic::take_hook());
    },
    |data: &[u8]| targets::template(data)
);
