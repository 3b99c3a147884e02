//! What one stage of a GPU hands over to another one: it comes whole, and steps are repeated behind it.

use std::path::PathBuf;

use kernels::{
    Backend, Cuda, CudaArray, CudaMatrix, CudaOperand, CudaVector, DecodeStep, KvDtype, Parcel, WeightType,
    WorkSize,
};

use crate::battery::cuda::{FIXED, device, emulator};
use crate::battery::device::Device;

/// What one stage hands over another one of the same GPU takes, whatever becomes of the array in the meantime.
fn check_parcels(libraries: Option<PathBuf>) {
    let (from, to) = (device(libraries.clone(), FIXED), device(libraries, FIXED));
    for (rows, cols) in [(0, 8), (1, 1), (3, 130), (2, 5)] {
        let values: Vec<f32> = (0..rows * cols).map(|i| i as f32 - 0.5).collect();
        let mut array = from.array(&values, cols);
        let parcel = from.backend.hand_over(&array).unwrap().expect("a GPU keeps arrays to itself");
        from.backend.upload(&vec![7.0; rows * cols], rows, cols, &mut array).unwrap();
        assert_eq!((parcel.shape(), parcel.values().unwrap()), ((rows, cols), values.clone()));
        let (mut taken, mut found) = (to.backend.array(), vec![9.0]);
        to.backend.take_over(&parcel, &mut taken).unwrap();
        to.backend.download(&taken, &mut found).unwrap();
        assert_eq!(found, values);
        // On a processor parcels are taken over through the host.
        let cpu = kernels::Reference::new(WeightType::Bf16, KvDtype::Bf16);
        let mut taken = cpu.array();
        cpu.take_over(&parcel, &mut taken).unwrap();
        assert_eq!(taken.values(), values);
    }
}

#[test]
fn stages_hand_over_arrays_on_the_emulator() {
    check_parcels(Some(emulator()));
}

/// A stage's step of rows that decode, `x += norm(x) · wᵀ`, of what it was given by another stage.
struct Repeated {
    on: Device<Cuda>,
    x: CudaArray,
    normed: CudaOperand,
    weights: (CudaVector, CudaMatrix),
}

impl Repeated {
    const COLS: usize = 40;

    fn new(libraries: Option<PathBuf>) -> Self {
        let on = device(libraries, FIXED);
        let size = WorkSize { rows: 8, hidden: Self::COLS, parcels: 2, ..WorkSize::default() };
        on.backend.reserve_work(&size).unwrap();
        let (mut x, mut normed) = (on.backend.array(), on.backend.operand());
        on.backend.reserve(&mut x, 8, Self::COLS).unwrap();
        on.backend.reserve_operand(&mut normed, 8, Self::COLS).unwrap();
        let numbers = |count: usize| (0..count).map(|i| (i % 13) as f32 / 8.0 - 0.7).collect::<Vec<f32>>();
        let weights = (
            on.vector(&numbers(Self::COLS)),
            on.matrix(&numbers(Self::COLS * Self::COLS), Self::COLS, Self::COLS),
        );
        Repeated { on, x, normed, weights }
    }

    /// Of one row.
    fn step(&mut self, given: Result<&Parcel, &[f32]>, is_repeated: bool) -> Parcel {
        let Repeated { on: Device { backend, .. }, x, normed, weights: (norm, w) } = self;
        match given {
            Ok(parcel) => backend.take_over(parcel, x).unwrap(),
            Err(values) => backend.upload(values, 1, Self::COLS, x).unwrap(),
        }
        let mut work = || -> kernels::Result<()> {
            backend.rms_norm(x, norm, 1e-5, normed)?;
            backend.matmul_add(normed, w, x)
        };
        match is_repeated {
            true => backend.repeat(&DecodeStep { rows: 1, positions: &[3], slices: &[] }, work),
            false => work(),
        }
        .unwrap();
        backend.hand_over(&self.x).unwrap().expect("a GPU keeps arrays to itself")
    }
}

/// Each stage of a pipeline launches its step as a graph, which begins behind what it was given.
#[test]
fn stages_that_hand_over_repeat_their_steps() {
    let mut stages = [Repeated::new(Some(emulator())), Repeated::new(Some(emulator()))];
    for step in 0..5_u64 {
        let values: Vec<f32> = (0..Repeated::COLS).map(|i| (i as f32 + step as f32).sin()).collect();
        let mut pass = |is_repeated| {
            let [first, second] = &mut stages;
            let parcel = first.step(Err(&values), is_repeated);
            second.step(Ok(&parcel), is_repeated).values().unwrap()
        };
        let (plain, repeated) = (pass(false), pass(true));
        assert_eq!(repeated, plain, "step {step}");
        let launched = stages.each_ref().map(|stage| stage.on.backend.launched_graphs());
        assert_eq!(launched, [step; 2], "step {step}");
    }
}

#[test]
#[ignore = "needs a CUDA device"]
fn stages_hand_over_arrays_on_a_gpu() {
    check_parcels(None);
}
