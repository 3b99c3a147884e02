//! What `config.json` says of a checkpoint that is quantised already: whether it is of a kind that can be read.
//!
//! Which matrices are quantised, and how, their own tensors say; see [`crate::quantized`].

use serde_json::Value;

use crate::error::Result;
use crate::fields::Fields;

const KEY: &str = "quantization_config";

/// # Errors
/// Methods, formats and number types that are not implemented, by name.
pub(crate) fn check(top: &Fields<'_>) -> Result<()> {
    let Some(value) = top.value(KEY) else { return Ok(()) };
    let fields = top.object(KEY, value)?;
    match text(&fields, "quant_method", "\"compressed-tensors\" or \"modelopt\"")? {
        "compressed-tensors" => compressed_tensors(&fields),
        "modelopt" => match text(&fields, "quant_algo", "\"FP8\"")? {
            "FP8" => Ok(()),
            other => Err(fields.error("quant_algo", format!("{other:?}"), "\"FP8\"")),
        },
        other => {
            let expected = "\"compressed-tensors\" or \"modelopt\": others are not implemented";
            Err(fields.error("quant_method", format!("{other:?}"), expected))
        }
    }
}

/// Whether a checkpoint asks for keys and values in fp8: compressed-tensors and newer exports of ModelOpt by a `kv_cache_scheme`
/// of its numbers, older ones by name.
pub(crate) fn asks_for_fp8_kv(top: &Fields<'_>) -> Result<bool> {
    let Some(value) = top.value(KEY) else { return Ok(false) };
    let fields = top.object(KEY, value)?;
    let is_named = fields.value("kv_cache_quant_algo").is_some_and(|algo| algo == "FP8");
    let Some(scheme) = fields.value("kv_cache_scheme") else { return Ok(is_named) };
    let scheme = fields.object("kv_cache_scheme", scheme)?;
    let is = |key: &str, wanted: Value| scheme.value(key).is_some_and(|found| *found == wanted);
    Ok(is_named || (is("num_bits", 8.into()) && is("type", "float".into())))
}

fn compressed_tensors(fields: &Fields<'_>) -> Result<()> {
    const FORMATS: &str = "\"pack-quantized\" or \"float-quantized\"";
    let expected = match text(fields, "format", FORMATS)? {
        "pack-quantized" => Weights { num_bits: 4, kind: "int", strategies: ["group", "channel"] },
        "float-quantized" => Weights { num_bits: 8, kind: "float", strategies: ["tensor", "channel"] },
        other => return Err(fields.error("format", format!("{other:?}"), FORMATS)),
    };
    for key in ["transform_config", "sparsity_config"] {
        let is_empty = match fields.value(key) {
            Some(Value::Object(map)) => map.is_empty() || map.get("format").is_some_and(|f| f == "dense"),
            Some(_) => false,
            None => true,
        };
        if !is_empty {
            return Err(fields.error(key, &fields.map[key], "nothing: it is not implemented"));
        }
    }
    let groups = fields.half("config_groups")?;
    for (name, group) in groups.map {
        expected.check(&groups.object(name, group)?.half("weights")?)?;
    }
    Ok(())
}

/// What a group of matrices must be.
struct Weights {
    num_bits: usize,
    kind: &'static str,
    strategies: [&'static str; 2],
}

impl Weights {
    fn check(&self, weights: &Fields<'_>) -> Result<()> {
        let Weights { num_bits, kind, strategies } = self;
        let found = weights.count("num_bits")?;
        if found != *num_bits {
            return Err(weights.error("num_bits", found, num_bits));
        }
        let expected = format!("{kind:?}");
        match text(weights, "type", &expected)? {
            found if found == *kind => {}
            other => return Err(weights.error("type", format!("{other:?}"), expected)),
        }
        let expected = format!("{:?} or {:?}", strategies[0], strategies[1]);
        match text(weights, "strategy", &expected)? {
            found if strategies.contains(&found) => {}
            other => return Err(weights.error("strategy", format!("{other:?}"), expected)),
        }
        weights.refuse("dynamic")
    }
}

fn text<'a>(fields: &Fields<'a>, key: &str, expected: &str) -> Result<&'a str> {
    let found = fields.value(key);
    found
        .and_then(Value::as_str)
        .ok_or_else(|| fields.error(key, found.map_or("nothing".to_owned(), Value::to_string), expected))
}
