package main

import (
	"cmp"
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"syscall"
	"time"
)

// options are the flags.
type options struct {
	rows    *regexp.Regexp
	systems *regexp.Regexp
	rounds  int
	quick   bool
	latency time.Duration // added to every response
	lazyvol string        // the binary
	tools   string        // the folder with versitygw, toxiproxy and rclone
	work    string        // the folder of everything that is written
	json    string        // the file for all samples
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	switch err := run(ctx, os.Args[1:]); {
	case errors.Is(err, flag.ErrHelp), errors.Is(err, errUsage):
		os.Exit(2)
	case ctx.Err() != nil:
		fmt.Fprintln(os.Stderr, "bench: interrupted")
		os.Exit(130)
	case err != nil:
		fmt.Fprintf(os.Stderr, "bench: %v\n", err)
		os.Exit(1)
	}
}

// errUsage is a mistake on the command line, which was printed.
var errUsage = errors.New("usage")

func run(ctx context.Context, args []string) error {
	o, list, err := parse(args)
	if err != nil {
		return err
	}
	if list {
		for _, g := range groups() {
			for _, row := range g.rows {
				fmt.Printf("%-24s %s\n", row.name, row.title)
			}
		}
		return nil
	}
	if os.Geteuid() != 0 {
		return errors.New("mounts and loop devices need root")
	}
	b := &bench{options: o, figures: newFigures()}
	defer b.cleanUp()
	if err := b.prepare(ctx); err != nil {
		return err
	}
	// A row that fails is told and leaves a gap, and the others are of use.
	failed := b.measure(ctx)
	report := b.report()
	report.markdown(os.Stdout)
	if o.json != "" {
		failed = errors.Join(failed, report.writeJSON(o.json))
	}
	return failed
}

func parse(args []string) (o options, list bool, err error) {
	flags := flag.NewFlagSet("bench", flag.ContinueOnError)
	rows := flags.String("run", "", "measure only rows whose name matches this `regexp`")
	systems := flags.String("systems", "", "measure only systems whose name matches this `regexp`, and lazyvol")
	flags.IntVar(&o.rounds, "rounds", 3, "measure everything so many times, and take medians")
	flags.BoolVar(&o.quick, "quick", false, "a quarter of the image, seconds instead of minutes: to see that it works")
	flags.DurationVar(&o.latency, "latency", 20*time.Millisecond, "what every response of the S3 server takes longer")
	flags.StringVar(&o.lazyvol, "lazyvol", "bin/lazyvol", "the binary")
	flags.StringVar(&o.tools, "tools", defaultTools(), "the `folder` with versitygw, toxiproxy-server and rclone")
	flags.StringVar(&o.work, "work", filepath.Join(os.TempDir(), "lazyvol-bench"), "a `folder` with some 15 GiB of room; the image stays in it for the next run")
	flags.StringVar(&o.json, "json", "", "write all samples to this `file`")
	flags.BoolVar(&list, "list", false, "list the rows and end")
	if err := flags.Parse(args); err != nil {
		return o, false, cmp.Or(flagError(err), errUsage)
	}
	if o.rounds < 1 || flags.NArg() > 0 {
		fmt.Fprintln(os.Stderr, "bench: -rounds must be positive, and there are no arguments")
		return o, false, errUsage
	}
	for _, e := range []struct {
		text string
		to   **regexp.Regexp
	}{{*rows, &o.rows}, {*systems, &o.systems}} {
		if *e.to, err = regexp.Compile(e.text); err != nil {
			fmt.Fprintf(os.Stderr, "bench: %v\n", err)
			return o, false, errUsage
		}
	}
	for _, path := range []*string{&o.lazyvol, &o.tools, &o.work} {
		if *path, err = filepath.Abs(*path); err != nil {
			return o, false, err
		}
	}
	return o, list, nil
}

// flagError passes on that help was asked for; other errors were printed.
func flagError(err error) error {
	if errors.Is(err, flag.ErrHelp) {
		return err
	}
	return nil
}

// defaultTools is the folder that the Makefile builds tools in.
func defaultTools() string {
	cache, err := os.UserCacheDir()
	if err != nil {
		cache = "/root/.cache"
	}
	return filepath.Join(cache, "lazyvol-tools")
}

// overrides are the variables that the Makefile passes tools in.
var overrides = map[string]string{"versitygw": "LAZYVOL_VERSITYGW", "toxiproxy-server": "LAZYVOL_TOXIPROXY"}

// tool returns the path of a program: of its variable, in the folder of tools,
// or in $PATH.
func (o options) tool(name string) (string, error) {
	if path := os.Getenv(overrides[name]); path != "" {
		return path, nil
	}
	path := filepath.Join(o.tools, name)
	if _, err := os.Stat(path); err == nil {
		return path, nil
	}
	path, err := exec.LookPath(name)
	if err != nil {
		return "", fmt.Errorf("%s is not installed (make setup tools, scripts/bench-setup)", name)
	}
	return path, nil
}
