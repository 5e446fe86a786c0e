//go:build !race

package volume

const thinning = 1
