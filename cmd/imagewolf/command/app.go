// Package command is the command line of imagewolf: the daemon of a node and
// the operator's tools beside it. It turns arguments into calls of the other
// packages and does no work of its own.
package command

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"

	"github.com/urfave/cli/v2"

	"github.com/imagewolf/imagewolf/cluster"
	"github.com/imagewolf/imagewolf/config"
	"github.com/imagewolf/imagewolf/internal/program"
)

const (
	configFlag = "config"
	configEnv  = "IMAGEWOLF_CONFIG"
)

// runner is a node that can be run until its context ends.
type runner interface {
	Run(ctx context.Context) error
}

// App returns the command line of imagewolf. The context it is run with ends
// the daemon.
func App() *cli.App { return newApp(newNode) }

// newApp takes what makes the node, so that the way to it can be tested
// without one.
func newApp(makeNode func(config.Config, *slog.Logger) (runner, error)) *cli.App {
	return program.New("imagewolf", "container images from the other nodes of a cluster, through containerd's own content store",
		daemonCommand(makeNode), configCommand(), clusterKeyCommand(), prefetchCommand(), demoCommand())
}

// settingFlags returns --config and one flag for every setting.
func settingFlags() []cli.Flag {
	flags := []cli.Flag{&cli.PathFlag{
		Name: configFlag, Aliases: []string{"c"}, EnvVars: []string{configEnv}, Value: config.DefaultFile,
		Usage: "`FILE` with the settings; the default one may be absent",
	}}
	for _, f := range config.Fields() {
		if f.Flag == "" {
			continue
		}
		// The environment is read by package config, in the same place as the
		// file, so the library must not look there.
		usage := fmt.Sprintf("%s [$%s]", f.Usage, f.Env)
		if f.Bool {
			flags = append(flags, &cli.BoolFlag{Name: f.Flag, Usage: usage})
			continue
		}
		flags = append(flags, &cli.StringFlag{Name: f.Flag, Usage: usage, DefaultText: f.Default})
	}
	return flags
}

// load reads the settings as the command line asks for them.
func load(c *cli.Context) (config.Config, error) {
	return config.Load(config.Sources{
		File:     c.Path(configFlag),
		Optional: !c.IsSet(configFlag),
		Env:      os.LookupEnv,
		Flags: func(name string) (string, bool) {
			return fmt.Sprint(c.Value(name)), c.IsSet(name)
		},
	})
}

// loadValid is load, and has the settings checked: its error says all that is wrong
// with the sources and with the values.
func loadValid(c *cli.Context) (config.Config, error) {
	cfg, err := load(c)
	if !config.Unread(err) {
		err = errors.Join(err, cfg.Validate())
	}
	return cfg, err
}

func clusterKeyCommand() *cli.Command {
	return &cli.Command{
		Name: "cluster-key", Usage: "the secret that makes nodes one cluster",
		Subcommands: []*cli.Command{{
			Name: "generate", Usage: "print a new key; give the same one to every node, and to nobody else",
			Before: program.NoArgs,
			Action: func(c *cli.Context) error {
				_, err := fmt.Fprintln(c.App.Writer, cluster.GenerateKey())
				return err
			},
		}, {
			Name: "ca", Usage: "print the certificate (PEM) by which the nodes are known; it follows from the cluster's key, and is no secret",
			Flags: settingFlags(), Before: program.NoArgs, Action: printCA,
		}},
	}
}

// printCA prints the CAs of the cluster's key and of those that are accepted
// beside it: while one replaces another, nodes show certificates of either.
func printCA(c *cli.Context) error {
	cfg, err := load(c)
	if err != nil {
		return err
	}
	key, err := cfg.Cluster.Key()
	if err != nil {
		return err
	}
	if key == "" {
		return errors.New("there is no cluster key: with certificates of your own, the nodes are known by their cluster.ca_file")
	}
	accepted, err := cfg.Cluster.Accepted()
	if err != nil {
		return err
	}
	for _, k := range append([]string{key}, accepted...) {
		pem, err := cluster.AuthorityPEM(k)
		if err != nil {
			return err
		}
		if _, err := c.App.Writer.Write(pem); err != nil {
			return err
		}
	}
	return nil
}
