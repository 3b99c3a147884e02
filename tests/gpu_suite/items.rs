//! What the suite asks, the most important first.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use kernels::{Cuda, CudaOptions, KvDtype, WeightType};

use crate::battery::collective::{self, Groups};
use crate::battery::cuda::{CHECKS, CHECKS_OF_GPUS};
use crate::real_shapes::{self, Matrix};
use crate::{attention, bulk, logits, models, products, steps, told};

/// Where and how large.
#[derive(Debug, Clone)]
pub(crate) struct Setting {
    /// Where CUDA's libraries are looked for first.
    pub(crate) libraries: Option<PathBuf>,
    /// Shapes for an emulator.
    pub(crate) is_small: bool,
    /// Where what one process finds out of the GPU waits for the next one.
    pub(crate) cache: PathBuf,
}

impl Setting {
    pub(crate) fn cuda(&self, weights: WeightType, kv: KvDtype, is_deterministic: bool) -> Result<Cuda> {
        let options = CudaOptions {
            device: 0,
            weights,
            kv,
            is_deterministic,
            has_graphs: true,
            ffn_columns: Cuda::FFN_COLUMNS,
            libraries: self.libraries.clone(),
            cubins: Some(self.cache.clone()),
        };
        Ok(Cuda::new(options)?)
    }
}

/// Headings of the results, in order.
pub(crate) const SECTIONS: [&str; 10] = [
    "Device",
    "Battery",
    "Real shapes",
    "Collectives",
    "Logits",
    "Models",
    "Jobs",
    "Products",
    "Attention",
    "Steps",
];

/// The section whose items share a process.
const BATTERY: &str = "Battery";

/// An item's lines of Markdown.
type Run = Box<dyn Fn(&Setting) -> Result<Vec<String>>>;

/// A question.
pub(crate) struct Item {
    pub(crate) section: &'static str,
    pub(crate) name: String,
    /// What it is to reach; it begins with `none` where nothing is held against it.
    pub(crate) bar: &'static str,
    /// Whether it asks what is right: its end without an error is the answer, while a figure's lines have a verdict.
    pub(crate) is_check: bool,
    /// It is not begun with less time than this.
    pub(crate) least_seconds: u64,
    /// It is ended after this.
    pub(crate) most_seconds: u64,
    run: Run,
}

impl Item {
    pub(crate) fn new(
        section: &'static str,
        name: impl Into<String>,
        bar: &'static str,
        [least_seconds, most_seconds]: [u64; 2],
        run: impl Fn(&Setting) -> Result<Vec<String>> + 'static,
    ) -> Item {
        let is_check = false;
        Item { section, name: name.into(), bar, is_check, least_seconds, most_seconds, run: Box::new(run) }
    }

    /// One that asks what is right.
    pub(crate) fn check(
        section: &'static str,
        name: impl Into<String>,
        bar: &'static str,
        seconds: [u64; 2],
        run: impl Fn(&Setting) -> Result<Vec<String>> + 'static,
    ) -> Item {
        Item { is_check: true, ..Item::new(section, name, bar, seconds, run) }
    }

    /// Whether one process may answer both: of what asks little, most of the time is that of a process's start.
    pub(crate) fn shares_process_with(&self, other: &Item) -> bool {
        [self, other].iter().all(|item| item.section == BATTERY)
    }
}

/// Why an item has asked nothing.
#[derive(Debug)]
pub(crate) struct NothingAsked(String);

impl std::fmt::Display for NothingAsked {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for NothingAsked {}

/// Answers some of them in this process, one after the other.
pub(crate) fn answer(names: &[String], setting: &Setting) -> Result<()> {
    let items = all(setting);
    // The GPU's context is made once for all, as long as somebody holds it.
    let is_held = names.len() > 1;
    let _held = is_held
        .then(|| setting.cuda(WeightType::Bf16, KvDtype::Bf16, true))
        .transpose()
        .context("hold the GPU")?;
    for name in names {
        let item = items.iter().find(|item| item.name == *name);
        let said = match (item.with_context(|| format!("there is no item {name}"))?.run)(setting) {
            Ok(lines) => told::answer(&lines),
            Err(error) if error.is::<NothingAsked>() => told::nothing_asked(&error.to_string()),
            Err(error) => return Err(error),
        };
        println!("{said}");
    }
    Ok(())
}

/// Checks that an emulator is through with in less than a second.
pub(crate) const QUICK: [&str; 5] = [
    "a_step_is_captured_once_and_repeated",
    "embed_and_gather_copy_rows",
    "no_rows_are_no_work",
    "rms_norm_divides_by_the_root_of_the_mean_square",
    "rope_turns_each_dimension_with_the_one_half_a_head_away",
];

/// The bar of what compares.
const WITHIN: &str = "within the check's bound";

/// In such an order that what comes to its end within the time answers most: that operations and a model are right, a part of each bar, all
/// else that is to be right, and the rest of the bars.
pub(crate) fn all(setting: &Setting) -> Vec<Item> {
    let mut logits = logits::sources().into_iter().map(of_logits);
    let mut models = models::of(setting).into_iter().map(model);
    let mut products = products::shapes(setting).into_iter().map(of_product);
    let mut items = vec![Item::new("Device", "ceilings", "none", [5, 60], ceilings)];
    items.extend(battery(setting));
    items.extend(logits.by_ref().take(1));
    // The ten blocks of Ultra, and then all of it.
    items.extend(models.by_ref().take(2));
    let blocks = models::for_steps(setting);
    items.push(Item::new("Steps", blocks.name, blocks.bar, blocks.seconds, move |setting: &Setting| {
        steps::measure(&blocks, setting)
    }));
    items.extend(attention::cases(setting).into_iter().map(of_attention));
    items.extend(products.by_ref().take(2));
    items.extend(real_shapes(setting));
    items.extend(of_collectives());
    items.extend(logits);
    items.extend(models::for_bulk(setting).into_iter().map(job));
    items.extend(products);
    items.extend(models);
    items
}

fn battery(setting: &Setting) -> impl Iterator<Item = Item> {
    let is_small = setting.is_small;
    let wanted = CHECKS.iter().chain(CHECKS_OF_GPUS);
    let wanted = wanted.filter(move |(name, _)| !is_small || QUICK.contains(name));
    wanted.map(|(name, check)| {
        Item::check(BATTERY, *name, WITHIN, [2, 90], move |setting: &Setting| {
            check(setting.libraries.as_deref());
            Ok(vec!["right".to_owned()])
        })
    })
}

fn real_shapes(setting: &Setting) -> Vec<Item> {
    let matrices: &[(&str, &'static [Matrix])] = match setting.is_small {
        true => &[("products with small matrices", &real_shapes::SMALL)],
        false => {
            &[("products with Ultra's", &real_shapes::ULTRA), ("products with Super's", &real_shapes::SUPER)]
        }
    };
    let products = matrices.iter().map(|&(name, matrices)| {
        Item::check("Real shapes", name, WITHIN, [10, 120], move |setting: &Setting| {
            real_shapes::products(matrices, setting)
        })
    });
    let attention = real_shapes::heads(setting).into_iter().map(|heads| {
        let name = format!("attention in groups of {} at {} tokens", heads.group, heads.context);
        Item::check("Real shapes", name, WITHIN, [5, 90], move |setting: &Setting| {
            real_shapes::attention(heads, setting)
        })
    });
    products.chain(attention).collect()
}

fn of_collectives() -> Vec<Item> {
    let of_two = collective::CHECKS.into_iter().map(|(name, check)| {
        Item::check("Collectives", name, WITHIN, [2, 60], move |setting: &Setting| {
            collectives(&[check], 2, setting)
        })
    });
    let alone = "a rank alone, which says nothing of several";
    let alone = Item::check("Collectives", alone, "none", [2, 60], |setting: &Setting| {
        collectives(&collective::CHECKS_OF_ONE, 1, setting)
    });
    of_two.chain([alone]).collect()
}

fn of_logits((name, source): (String, logits::Source)) -> Item {
    let name = format!("{name} against plain loops in f32");
    Item::check("Logits", name, source.bar(), [5, 60], move |setting: &Setting| {
        logits::measure(source, setting)
    })
}

fn of_product(shape: products::Shape) -> Item {
    let bar = "85 % of the best of cuBLASLt; aim 95 %";
    Item::new("Products", shape.to_string(), bar, [8, 60], move |setting: &Setting| {
        products::measure(shape, setting)
    })
}

fn of_attention(case: attention::Case) -> Item {
    let bar = "split 75 % of the copy bandwidth; aim 90 %";
    Item::new("Attention", case.to_string(), bar, [5, 40], move |setting: &Setting| {
        attention::measure(case, setting)
    })
}

fn job(model: models::Measured) -> Item {
    Item::new("Jobs", model.name, model.bar, model.seconds, move |setting: &Setting| {
        bulk::measure(&model, setting)
    })
}

fn model(model: models::Measured) -> Item {
    Item::new("Models", model.name, model.bar, model.seconds, move |setting: &Setting| {
        models::measure(&model, setting)
    })
}

/// Checks of NCCL with groups of up to so many ranks on the one GPU; nothing is asked where NCCL does not let as many be there.
fn collectives(checks: &[collective::Check], most: usize, setting: &Setting) -> Result<Vec<String>> {
    let make = |num_ranks: usize, patience: Duration| {
        collective::on_gpus(setting.libraries.as_deref(), num_ranks, patience)
    };
    if let Err(error) = make(most, Duration::from_secs(20)) {
        return Err(NothingAsked(format!("no group of {most}: {error}")).into());
    }
    let make = |num_ranks: usize, patience: Duration| make(num_ranks, patience).expect("it was there");
    checks.iter().for_each(|check| check(&Groups { name: "nccl", make: &make, most }));
    Ok(vec![format!("right, in groups of up to {most}")])
}

/// What was built, the GPU, the libraries that are there, and what it does at most.
fn ceilings(setting: &Setting) -> Result<Vec<String>> {
    let cuda = setting.cuda(WeightType::Bf16, KvDtype::Bf16, false)?;
    let (gpu, profile) = (cuda.gpu(), kernels::Backend::numeric_profile(&cuda));
    let library = match profile.contains("cublaslt") {
        true => profile.clone(),
        false => format!("{profile}; libcublasLt is missing: products are our own kernel's"),
    };
    Ok(vec![
        format!("commit {}", option_env!("SPANWISE_COMMIT").unwrap_or("not told")),
        format!(
            "{}, {} multiprocessors, {:.1} GB",
            gpu.name,
            gpu.multiprocessors,
            gpu.total_bytes as f64 / 1e9
        ),
        driver().unwrap_or_else(|| "driver: its version is not told".to_owned()),
        library,
        format!("copy {:.0} GB/s read and written", cuda.copy_bandwidth()? / 1e9),
        format!("bf16 products {:.1} TFLOP/s", cuda.product_flops()? / 1e12),
    ])
}

fn driver() -> Option<String> {
    let version = std::fs::read_to_string(Path::new("/proc/driver/nvidia/version")).ok()?;
    version.lines().next().map(str::to_owned)
}
