package blockstore

// For the fuzz tests of what is read from outside.
var (
	ParseURL          = parseURL
	ParseContentRange = parseContentRange
)
